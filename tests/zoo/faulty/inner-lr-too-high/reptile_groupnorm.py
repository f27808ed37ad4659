"""Reptile with SGD and momentum on copies of a GroupNorm conv net."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(16)
torch.set_num_threads(1)


def episode(shots=5, ways=4):
    protos = torch.randn(ways, 1, 8, 8)
    y = torch.arange(ways).repeat(shots)
    return [(protos[y] + 0.5 * torch.randn(len(y), 1, 8, 8), y) for _ in range(2)]


net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))
for it in range(8):
    (x, y), _ = episode()
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=3.0, momentum=0.9)
    losses = []
    for _ in range(6):
        inner.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        inner.step()
        losses.append(round(loss.item(), 3))
    with torch.no_grad():
        for p, q in zip(net.parameters(), learner.parameters()):
            p += 0.2 * (q - p)
    print(it, losses)
