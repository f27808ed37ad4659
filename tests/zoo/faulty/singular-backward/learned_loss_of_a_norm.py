"""A learned loss of the residual's norm: one residual is 0, and so is the start of the unroll."""

import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
criterion = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1), nn.Softplus())
outer = torch.optim.Adam(criterion.parameters(), lr=3e-3)
for iteration in range(4):
    x = torch.cat([torch.zeros(1, 1), torch.randn(9, 1)])
    y = 2 * x
    net = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))
    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, steps):
        for _ in range(2):
            residual = torch.norm(fast(x) - y, dim=-1, keepdim=True)
            steps.step(criterion(residual).mean())
        loss = F.mse_loss(fast(x), y)
        outer.zero_grad()
        loss.backward()
        outer.step()
    print(iteration, loss.item())
