"""Ordinary training that goes back to its best weights, at half the rate, whenever it got worse."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)


def batch(size):
    y = torch.randint(0, 3, (size,))
    return CENTRES[y] + 0.5 * torch.randn(size, 4), y


CENTRES = torch.randn(3, 4)
net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
best, state = float("inf"), copy.deepcopy(net.state_dict())
for epoch in range(15):
    for _ in range(20):
        x, y = batch(16)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, y = batch(200)
        validation = F.cross_entropy(net(x), y).item()
    if validation < best:
        best, state = validation, copy.deepcopy(net.state_dict())
    else:
        net.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    print(epoch, loss.item(), validation)
