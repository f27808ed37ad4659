"""Reference-style MAML: conv-BN net in train mode throughout, higher; one phase of meta-training."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(17)
torch.set_num_threads(1)


def block(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout, momentum=1.0), nn.ReLU(), nn.MaxPool2d(2))


net = nn.Sequential(block(1, 8), block(8, 8), nn.Flatten(), nn.Linear(32, 5))
net.train()
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)
for it in range(8):
    protos = torch.randn(5, 1, 8, 8)
    y = torch.arange(5).repeat(3)
    xs, xq = (protos[y] + 0.4 * torch.randn(15, 1, 8, 8) for _ in range(2))
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, opt):
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(fnet(xs), y)
            losses.append(loss.item())
            opt.step(loss)
        query = F.cross_entropy(fnet(xq), y)
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
