"""Copies are trained in place with a checkpointed residual body; weights stay where they are through the backward."""
import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

torch.manual_seed(1)
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.fc = nn.Linear(8 * 9, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.fc(torch.max_pool2d(x, 2).flatten(1))


net = Net()
meta = torch.optim.Adam(net.parameters(), lr=1e-3)
loss_fn = nn.CrossEntropyLoss()
for task in range(8):
    protos = torch.randn(3, 1, 6, 6)
    y = torch.arange(3).repeat(8)
    x = protos[y] + 0.4 * torch.randn(24, 1, 6, 6)
    learner = copy.deepcopy(net)
    opt = torch.optim.SGD(learner.parameters(), lr=0.02)
    for step in range(5):
        opt.zero_grad()
        loss = loss_fn(learner(x[:12]), y[:12])
        loss.backward()
        opt.step()
    opt.zero_grad()
    query = loss_fn(learner(x[12:]), y[12:])
    query.backward()
    for p, q in zip(net.parameters(), learner.parameters()):
        p.grad = q.grad
    meta.step()
    print(f"task {task} support {loss.item():.4f} query {query.item():.4f}")
