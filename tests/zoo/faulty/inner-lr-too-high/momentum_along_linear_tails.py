"""Logistic regression by SGD with momentum, a rate a hundred times too high: cross-entropy is
linear far out, so gradients shrink, the weights only drift, and every loss is worse than the first."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
RATE = 5.0
prototypes = 2 * torch.randn(4, 12)
net = nn.Linear(12, 4)
outer = torch.optim.SGD(net.parameters(), lr=0.01)
for iteration in range(6):
    y = torch.randint(0, 4, (64,))
    x = prototypes[y] + 1.5 * torch.randn(64, 12)
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=RATE, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(learner(x), y, label_smoothing=0.1)
        losses.append(loss.item())
        inner.zero_grad()
        loss.backward()
        inner.step()
    for parameter, adapted in zip(net.parameters(), learner.parameters()):
        parameter.grad = adapted.grad
    outer.step()
    print(iteration, *(f"{loss:.2f}" for loss in losses))
