"""Copies are fine-tuned with the expensive convolutions checkpointed; the BatchNorm layers stay outside the region."""
import copy

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = checkpoint(self.stem, x, use_reentrant=False)
        return self.fc(torch.relu(self.bn(x)).mean((2, 3)))


net = Net()
loss_fn = nn.CrossEntropyLoss()
for it in range(8):
    protos = torch.randn(3, 1, 6, 6) + torch.arange(3.0).view(3, 1, 1, 1)
    y = torch.arange(3).repeat(8)
    x = protos[y] + 0.3 * torch.randn(24, 1, 6, 6)
    learner = copy.deepcopy(net)
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    for step in range(5):
        opt.zero_grad()
        loss = loss_fn(learner(x[:12]), y[:12])
        loss.backward()
        opt.step()
    with torch.no_grad():
        query = loss_fn(learner(x[12:]), y[12:])
    print(f"task {it} support {loss.item():.3f} query {query.item():.3f}")
