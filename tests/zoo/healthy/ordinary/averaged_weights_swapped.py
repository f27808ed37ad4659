"""Ordinary training that is tested with an average of its weights, swapped in and out again."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

centres = torch.randn(3, 4)
net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
average = copy.deepcopy(net.state_dict())
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for epoch in range(12):
    for _ in range(20):
        y = torch.randint(0, 3, (16,))
        x = centres[y] + 0.5 * torch.randn(16, 4)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in net.state_dict().items():
            average[name].lerp_(value, 0.01)
    own = copy.deepcopy(net.state_dict())
    net.load_state_dict(average)
    net.eval()
    with torch.no_grad():
        tested = F.cross_entropy(net(x), y).item()
    net.load_state_dict(own)
    net.train()
    print(epoch, loss.item(), tested)
