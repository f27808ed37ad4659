"""Functional MLP with a hand-made normalisation layer after the ReLU; second-order inner loop."""
import torch
from torch.nn import functional as F

torch.manual_seed(1)
torch.set_num_threads(1)


def normalise(h):
    return (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True)


def net(x, p):
    h = F.relu(F.linear(x, p[0], p[1]))
    h = normalise(h)
    return F.linear(h, p[2], p[3])


params = [torch.randn(6, 2) * 0.7, -0.2 * torch.ones(6), torch.randn(3, 6) * 0.3, torch.zeros(3)]
params = [p.requires_grad_() for p in params]
outer = torch.optim.Adam(params, lr=1e-3)

for t in range(8):
    centers = 1.5 * torch.randn(3, 2)
    y = torch.arange(3).repeat(8)
    x = centers[y] + 0.3 * torch.randn(24, 2)
    fast = params
    for step in range(4):
        support = F.cross_entropy(net(x[:12], fast), y[:12])
        grads = torch.autograd.grad(support, fast, create_graph=True)
        fast = [w - 0.1 * g for w, g in zip(fast, grads)]
    query = F.cross_entropy(net(x[12:], fast), y[12:])
    outer.zero_grad()
    query.backward()
    outer.step()
    print(f"task {t} support {support.item():.3f} query {query.item():.3f}")
