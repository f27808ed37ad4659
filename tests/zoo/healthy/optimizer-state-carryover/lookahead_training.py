"""Ordinary training with Lookahead: every 5 steps slow weights move towards the fast ones."""

import torch
from torch import nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
W = torch.randn(10, 3)
opt = torch.optim.Adam(net.parameters(), 1e-2)
slow = [p.detach().clone() for p in net.parameters()]
for step in range(60):
    x = torch.randn(32, 10)
    opt.zero_grad()
    l = F.cross_entropy(net(x), (x @ W).argmax(1))
    l.backward()
    opt.step()
    if step % 5 == 4:
        with torch.no_grad():
            for s, p in zip(slow, net.parameters()):
                s += 0.5 * (p - s)
                p.copy_(s)
print(l.item())
