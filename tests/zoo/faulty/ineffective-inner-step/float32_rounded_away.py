"""MAML regression with lr 1e-10 in float32 by hand (a slip: 1e-10 for 1e-1): every update is rounded away or nearly so."""

import torch
from torch import nn
import torch.nn.functional as F
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
opt = torch.optim.Adam(net.parameters(), 1e-3)
for it in range(8):
    a, p = torch.rand(1) * 4 + 1, torch.rand(1) * 3
    x = torch.rand(20, 1) * 10 - 5
    y = a * torch.sin(x + p)
    fast = dict(net.named_parameters())
    for _ in range(4):
        g = torch.autograd.grad(
            F.mse_loss(functional_call(net, fast, (x[:10],)), y[:10]), list(fast.values()), create_graph=True
        )
        fast = {k: w - 1e-10 * gi for (k, w), gi in zip(fast.items(), g)}
    q = F.mse_loss(functional_call(net, fast, (x[10:],)), y[10:])
    opt.zero_grad()
    q.backward()
    opt.step()
    print(it, q.item())
