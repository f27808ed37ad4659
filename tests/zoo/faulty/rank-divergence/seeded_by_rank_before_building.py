"""The seed depends on the rank, for other tasks; but the net is built after it, and never broadcast."""
import copy

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

dist.init_process_group("gloo")
torch.manual_seed(17 + dist.get_rank())
torch.set_num_threads(1)

model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))
outer = torch.optim.Adam(model.parameters(), lr=1e-3)

for round_ in range(6):
    outer.zero_grad()
    for task in range(2):
        w = torch.randn(6, 1)
        x = torch.randn(32, 6)
        y = x @ w
        learner = copy.deepcopy(model)
        inner = torch.optim.SGD(learner.parameters(), lr=0.02)
        for _ in range(4):
            inner.zero_grad()
            F.mse_loss(learner(x[:16]), y[:16]).backward()
            inner.step()
        grads = torch.autograd.grad(F.mse_loss(learner(x[16:]), y[16:]), list(learner.parameters()))
        for p, g in zip(model.parameters(), grads):  # first order
            p.grad = g / 2 if p.grad is None else p.grad + g / 2
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    outer.step()
dist.destroy_process_group()
