"""MAML on a two-headed network; only the main head takes part in the support loss."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 24)
        self.main = nn.Linear(24, 3)
        self.rotation = nn.Linear(24, 4)

    def forward(self, x, head="main"):
        h = F.relu(self.trunk(x))
        return self.main(h) if head == "main" else self.rotation(h)


model = TwoHeads()
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)

for it in range(5):
    centres = torch.randn(3, 4)
    y = torch.arange(3).repeat(5)
    xs, xq = (centres[y] + 0.5 * torch.randn(15, 4) for _ in range(2))
    fast = dict(model.named_parameters())
    for _ in range(3):
        loss = F.cross_entropy(functional_call(model, fast, (xs,)), y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), grads)}
    query = F.cross_entropy(functional_call(model, fast, (xq,)), y)
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"it {it}: query {query.item():.4f}")
