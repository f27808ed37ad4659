"""The weight decay of each layer of a net is learned through twenty inner steps, with higher."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(23)
torch.set_num_threads(1)

x = torch.randn(60, 5)
y = x @ torch.randn(5, 1) + 0.3 * torch.randn(60, 1)
log_decay = torch.full((2,), -4.0, requires_grad=True)
outer = torch.optim.Adam([log_decay], lr=0.1)
for it in range(6):
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    with higher.innerloop_ctx(net, inner) as (fnet, diffopt):
        for _ in range(20):
            fit = F.mse_loss(fnet(x[:30]), y[:30])
            decay = sum(d.exp() * w.square().sum() for d, w in zip(log_decay, (fnet[0].weight, fnet[2].weight)))
            diffopt.step(fit + decay)
        validation = F.mse_loss(fnet(x[30:]), y[30:])
        outer.zero_grad()
        validation.backward()
    outer.step()
    print(it, validation.item(), log_decay.tolist())
