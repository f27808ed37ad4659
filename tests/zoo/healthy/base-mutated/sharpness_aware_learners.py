"""Learners that adapt by sharpness-aware steps; the base follows their query gradients."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)


class SAM:
    def __init__(self, parameters, base, rho):
        self.parameters, self.base, self.rho = list(parameters), base, rho

    @torch.no_grad()
    def ascend(self):
        norm = torch.stack([p.grad.norm() for p in self.parameters]).norm()
        self.moves = [self.rho * p.grad / (norm + 1e-12) for p in self.parameters]
        for p, e in zip(self.parameters, self.moves):
            p.add_(e)

    @torch.no_grad()
    def descend(self):
        for p, e in zip(self.parameters, self.moves):
            p.sub_(e)
        self.base.step()


net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
outer = torch.optim.Adam(net.parameters(), lr=1e-3)
for it in range(12):
    learner = copy.deepcopy(net)
    base = torch.optim.SGD(learner.parameters(), lr=0.02, momentum=0.9)
    inner = SAM(learner.parameters(), base, rho=0.05)
    x = torch.rand(20, 1) * 6 - 3
    y = (0.5 + torch.rand(1)) * torch.sin(x + torch.rand(1))
    for _ in range(4):
        base.zero_grad()
        F.mse_loss(learner(x), y).backward()
        inner.ascend()
        base.zero_grad()
        F.mse_loss(learner(x), y).backward()
        inner.descend()
    query = F.mse_loss(learner(x), y)
    for p, g in zip(net.parameters(), torch.autograd.grad(query, list(learner.parameters()))):
        p.grad = g
    outer.step()
    print(it, round(query.item(), 4))
