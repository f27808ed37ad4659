"""Copies adapted with Adam at 1e-8, a rate meant for another unit."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(33)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


net = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
for user in range(5):
    (x, y), (xq, yq) = episode()
    learner = copy.deepcopy(net)
    inner = torch.optim.Adam(learner.parameters(), lr=1e-8)
    for _ in range(5):
        inner.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        inner.step()
    print(user, loss.item())
