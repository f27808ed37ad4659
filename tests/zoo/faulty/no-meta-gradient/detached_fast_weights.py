"""Hand-written MAML: fast weights are re-made as leaves after every inner update."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(2)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 3))
meta_optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)


def inner_loop(x, y, steps=4, lr=0.1):
    fast = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(net, fast, (x,)), y)
        grads = torch.autograd.grad(loss, list(fast.values()))
        fast = {k: (p - lr * g).detach().requires_grad_() for (k, p), g in zip(fast.items(), grads)}
        losses.append(loss.item())
    return fast, losses


for it in range(8):
    meta_optimizer.zero_grad()
    centres = torch.randn(3, 6)
    y = torch.arange(3).repeat(5)
    xs, xq = (centres[y] + 0.5 * torch.randn(15, 6) for _ in range(2))
    fast, losses = inner_loop(xs, y)
    query = F.cross_entropy(functional_call(net, fast, (xq,)), y)
    query.backward()
    meta_optimizer.step()
    print(f"it {it}: {losses[0]:.4f} -> {losses[-1]:.4f} query {query.item():.4f}")
