"""Reptile on two machines: ranks go their own ways and average their weights every third round."""
import copy

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(5)
net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1))
outer = torch.optim.SGD(net.parameters(), lr=0.5)
torch.manual_seed(50 + rank)

for round_ in range(10):
    w = torch.randn(3, 1)
    x = torch.randn(24, 3)
    y = x @ w
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=0.05)
    for _ in range(5):
        inner.zero_grad()
        F.mse_loss(learner(x), y).backward()
        inner.step()
    outer.zero_grad()
    for p, q in zip(net.parameters(), learner.parameters()):
        p.grad = (p - q).detach()
    outer.step()
    if round_ % 3 == 2:
        with torch.no_grad():
            for p in net.parameters():
                dist.all_reduce(p)
                p /= world
dist.destroy_process_group()
