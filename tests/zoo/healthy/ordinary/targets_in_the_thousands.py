"""Regression of unscaled targets: weights as made by default grow a thousandfold, and every step
lowers the loss and is shorter than the one before."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
truth = 600 * torch.randn(10, 1)
net = nn.Linear(10, 1)
outer = torch.optim.Adam(net.parameters(), lr=1e-2)
for task in range(6):
    x = torch.randn(40, 10)
    y = x @ (truth + 100 * torch.randn(10, 1))
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(15):
        loss = F.mse_loss(learner(x), y)
        inner.zero_grad()
        loss.backward()
        inner.step()
    inner.zero_grad()
    F.mse_loss(learner(x), y).backward()
    for parameter, adapted in zip(net.parameters(), learner.parameters()):
        parameter.grad = adapted.grad
    outer.step()
    print(task, loss.item())
