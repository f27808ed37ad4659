"""ANIL on sinusoids with torch.func.grad: the body computes features once, only the head adapts."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

torch.manual_seed(0)
torch.set_num_threads(1)

body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
head = nn.Linear(32, 1)
opt = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)


def head_loss(p, h, y):
    return F.mse_loss(functional_call(head, p, (h,)), y)


for it in range(10):
    x = 6 * torch.rand(20, 1) - 3
    y = (1 + torch.rand(1)) * torch.sin(x + 3 * torch.rand(1))
    features = body(x)
    fast = dict(head.named_parameters())
    before = head_loss(fast, features[:10], y[:10]).item()
    for _ in range(5):
        g = grad(head_loss)(fast, features[:10], y[:10])
        fast = {k: fast[k] - 0.05 * g[k] for k in fast}
    after = head_loss(fast, features[:10], y[:10]).item()
    query = head_loss(fast, features[10:], y[10:])
    opt.zero_grad()
    query.backward()
    opt.step()
    print(f"it {it}: support {before:.3f} -> {after:.3f} query {query.item():.3f}")
