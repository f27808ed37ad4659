"""Meta-SGD: learned per-parameter step sizes, kept small and positive by a slow outer rate."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(9)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(5, 24), nn.GELU(), nn.Linear(24, 3))
alphas = {k: torch.full_like(p, 0.05).requires_grad_() for k, p in net.named_parameters()}
opt = torch.optim.Adam([{"params": net.parameters(), "lr": 2e-3}, {"params": alphas.values(), "lr": 1e-3}])

for it in range(10):
    opt.zero_grad()
    lines = []
    for _ in range(2):
        centres = torch.randn(3, 5)
        y = torch.arange(3).repeat(5)
        xs, xq = (centres[y] + 0.5 * torch.randn(15, 5) for _ in range(2))
        fast, losses = dict(net.named_parameters()), []
        for _ in range(4):
            loss = F.cross_entropy(functional_call(net, fast, (xs,)), y)
            losses.append(loss.item())
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {k: p - alphas[k] * g for (k, p), g in zip(fast.items(), grads)}
        query = F.cross_entropy(functional_call(net, fast, (xq,)), y)
        (query / 2).backward()
        lines.append(f"{losses[0]:.3f}->{losses[-1]:.3f}|{query.item():.3f}")
    opt.step()
    print(it, *lines)
