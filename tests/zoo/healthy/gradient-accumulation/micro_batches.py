"""Adaptation of copies with gradients accumulated over micro-batches, cleared before every step."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(15)
torch.set_num_threads(1)


def episode(shots=5, ways=4):
    protos = torch.randn(ways, 1, 8, 8)
    y = torch.arange(ways).repeat(shots)
    return [(protos[y] + 0.5 * torch.randn(len(y), 1, 8, 8), y) for _ in range(2)]


net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))
for it in range(6):
    (x, y), (xq, yq) = episode()
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=0.05)
    for _ in range(4):
        inner.zero_grad()
        for part in torch.arange(20).chunk(4):
            loss = F.cross_entropy(learner(x[part]), y[part]) / 4
            loss.backward()
        inner.step()
    with torch.no_grad():
        query = F.cross_entropy(learner(xq), yq)
    print(it, 4 * loss.item(), query.item())
