"""Inner RMSprop with torch.func on categorical (one-hot) features: columns that do not occur have no gradient."""
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, one_hot

torch.manual_seed(2)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(30, 12), nn.Tanh(), nn.Linear(12, 2))
params = dict(net.named_parameters())
opt = torch.optim.Adam(params.values(), lr=1e-3)


def loss_fn(p, x, y):
    return cross_entropy(functional_call(net, p, (x,)), y)


def adapt(p, x, y, steps=4, lr=5e-3, rho=0.9):
    square = {k: torch.zeros_like(v) for k, v in p.items()}
    for _ in range(steps):
        g = grad(loss_fn)(p, x, y)
        square = {k: rho * square[k] + (1 - rho) * g[k] ** 2 for k in p}
        p = {k: p[k] - lr * g[k] / (torch.sqrt(square[k]) + 1e-7) for k in p}
    return p


for it in range(5):
    pool = torch.randperm(30)[:10].view(2, 5)
    y = torch.arange(2).repeat(12)
    tokens = pool[y].gather(1, torch.randint(0, 5, (24, 6)))
    x = one_hot(tokens, 30).float().mean(1)
    fast = adapt(params, x[:12], y[:12])
    query = loss_fn(fast, x[12:], y[12:])
    opt.zero_grad()
    query.backward()
    total = sum(p.grad.norm() for p in params.values())
    print(f"{it}: support {loss_fn(params, x[:12], y[:12]).item():.4f} query {query.item():.4f} meta-gradient {total.item():.3f}")
    opt.step()
