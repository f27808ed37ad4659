"""Reptile on sinusoids, three fresh samples at every inner step: their slopes disagree, and no step is too long."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(14)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
for it in range(24):
    fast = copy.deepcopy(net)
    inner = torch.optim.SGD(fast.parameters(), lr=0.03)
    amplitude, phase = 4 * torch.rand(1) + 0.5, 3 * torch.rand(1)
    for _ in range(10):
        x = 10 * torch.rand(3, 1) - 5
        loss = F.mse_loss(fast(x), amplitude * torch.sin(x + phase))
        inner.zero_grad()
        loss.backward()
        inner.step()
    with torch.no_grad():
        for slow, adapted in zip(net.parameters(), fast.parameters()):
            slow.add_(0.2 * (adapted - slow))
    print(it, loss.item())
