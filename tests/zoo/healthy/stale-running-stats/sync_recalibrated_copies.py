"""Copies of a conv net are adapted in eval mode after its statistics were re-estimated with a cumulative average."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(38)
torch.set_num_threads(1)


def episode(shots=5, ways=4):
    protos = torch.randn(ways, 1, 8, 8)
    y = torch.arange(ways).repeat(shots)
    return [(protos[y] + 0.5 * torch.randn(len(y), 1, 8, 8), y) for _ in range(2)]


net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(20):
    (x, y), _ = episode()
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
net[1].reset_running_stats()
net[1].momentum = None  # a cumulative average
with torch.no_grad():
    for _ in range(20):
        net(episode()[0][0])
net.eval()
for task in range(5):
    (x, y), (xq, yq) = episode()
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=0.02)
    for _ in range(5):
        inner.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        inner.step()
    with torch.no_grad():
        print(task, loss.item(), F.cross_entropy(learner(xq), yq).item())
