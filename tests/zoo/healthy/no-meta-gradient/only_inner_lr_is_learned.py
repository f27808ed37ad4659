"""Learns only the inner learning rate of a fixed initialisation, with higher's override."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

backbone = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1))
log_lr = torch.tensor(-4.5, requires_grad=True)
lr_opt = torch.optim.Adam([log_lr], lr=0.1)

for it in range(12):
    w = torch.randn(3, 1)
    x = torch.randn(40, 3)
    y = torch.tanh(x @ w)
    inner = torch.optim.SGD(backbone.parameters(), lr=0.1)
    with higher.innerloop_ctx(backbone, inner, override={"lr": [log_lr.exp()]}) as (fnet, opt):
        first = None
        for _ in range(5):
            loss = F.mse_loss(fnet(x[:20]), y[:20])
            first = first or loss.item()
            opt.step(loss)
        query = F.mse_loss(fnet(x[20:]), y[20:])
    lr_opt.zero_grad()
    query.backward()
    lr_opt.step()
    print(f"{it}: lr {log_lr.exp().item():.4f} support {first:.3f} -> {loss.item():.3f} query {query.item():.3f}")
