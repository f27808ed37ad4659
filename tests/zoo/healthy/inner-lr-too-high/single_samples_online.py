"""Online adaptation, one labelled sample a step: every step has another loss."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(12)
torch.set_num_threads(1)

centres = 1.2 * torch.randn(5, 8)
net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(60):
    y = torch.randint(0, 5, (32,))
    optimizer.zero_grad()
    F.cross_entropy(net(centres[y] + torch.randn(32, 8)), y).backward()
    optimizer.step()
for user in range(20):
    shift = 0.7 * torch.randn(8)
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=0.05)
    losses = []
    for _ in range(12):
        y = torch.randint(0, 5, (1,))
        loss = F.cross_entropy(learner(centres[y] + shift + torch.randn(1, 8)), y)
        inner.zero_grad()
        loss.backward()
        inner.step()
        losses.append(round(loss.item(), 2))
    print(user, losses)
