"""Reptile with gradients from autograd.grad assigned to .grad, torch.optim inner, state_dict restores."""

import copy, torch
from torch import nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
for it in range(12):
    start = copy.deepcopy(net.state_dict())
    opt = torch.optim.SGD(net.parameters(), 0.02)
    a, ph = torch.rand(1) * 4, torch.rand(1) * 3
    for _ in range(4):
        x = torch.rand(10, 1) * 10 - 5
        l = F.mse_loss(net(x), a * torch.sin(x + ph))
        for p, g in zip(net.parameters(), torch.autograd.grad(l, list(net.parameters()))):
            p.grad = g
        opt.step()
    end = net.state_dict()
    net.load_state_dict({k: start[k] + 0.5 * (end[k] - start[k]) for k in start})
    print(it, l.item())
