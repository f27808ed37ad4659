"""The classifier starts at exactly zero in every task (its first relative update is unbounded); higher, conv body."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8 * 16, 5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


net = Net()
meta = torch.optim.Adam([*net.conv.parameters(), *net.norm.parameters()], lr=2e-3)
for it in range(8):
    protos = torch.randn(5, 1, 8, 8)
    y = torch.arange(5).repeat(3)
    xs, xq = (protos[y] + 0.4 * torch.randn(15, 1, 8, 8) for _ in range(2))
    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (f, opt):
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(f(xs), y)
            losses.append(loss.item())
            opt.step(loss)
        query = F.cross_entropy(f(xq), y)
    net.zero_grad()
    query.backward()
    meta.step()
    print(f"it {it}: " + " ".join(f"{v:.3f}" for v in losses) + f" query {query.item():.3f}")
