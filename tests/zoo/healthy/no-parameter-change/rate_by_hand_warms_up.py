"""The inner rate, a number of the loop, warms up from zero over the first tasks."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
from torch.func import functional_call

net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
opt = torch.optim.Adam(net.parameters(), 1e-3)
for t in range(12):
    lr = max(0, t - 4) * 0.01
    x = torch.randn(16, 4)
    y = x.sum(1, keepdim=True)
    fast = dict(net.named_parameters())
    for _ in range(5):
        l = F.mse_loss(functional_call(net, fast, (x,)), y)
        gs = torch.autograd.grad(l, list(fast.values()), create_graph=True)
        fast = {k: w - lr * g for (k, w), g in zip(fast.items(), gs)}
    opt.zero_grad()
    F.mse_loss(functional_call(net, fast, (x,)), y).backward()
    opt.step()
