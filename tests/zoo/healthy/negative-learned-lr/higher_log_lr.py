"""Learns the logarithm of the inner learning rate with higher, so the rate itself stays positive."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(4)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1))
log_lr = torch.tensor(-4.0, requires_grad=True)
opt = torch.optim.Adam([{"params": net.parameters()}, {"params": [log_lr], "lr": 0.05}], lr=1e-3)

for it in range(15):
    w = torch.randn(2, 1)
    x = torch.randn(24, 2)
    y = torch.sin(x @ w)
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    lr = log_lr.exp()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False, override={"lr": [lr]}) as (f, d):
        first = None
        for _ in range(4):
            loss = F.mse_loss(f(x[:12]), y[:12])
            first = first or loss.item()
            d.step(loss)
        query = F.mse_loss(f(x[12:]), y[12:])
    opt.zero_grad()
    query.backward()
    opt.step()
    print(f"{it}: lr {lr.item():.4f} support {first:.4f} -> {loss.item():.4f} query {query.item():.4f}")
