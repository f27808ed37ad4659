"""Fifty small inner steps on a tanh network with higher; meta-gradient norms stay of the same size."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
outer = torch.optim.Adam(net.parameters(), lr=1e-3)

for it in range(5):
    x = torch.randn(32, 4)
    y = torch.tanh(x @ torch.randn(4, 1))
    steps = 10 * (it + 1)
    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.03), copy_initial_weights=False) as (f, opt):
        losses = []
        for _ in range(steps):
            loss = F.mse_loss(f(x[:16]), y[:16])
            losses.append(loss.item())
            opt.step(loss)
        query = F.mse_loss(f(x[16:]), y[16:])
    outer.zero_grad()
    query.backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
    outer.step()
    print(f"{steps} steps: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f} meta-gradient {norm:.3f}")
