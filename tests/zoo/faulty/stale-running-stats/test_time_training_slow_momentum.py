"""Test-time training on rotations: predicts with statistics a momentum of 0.001 has left at their start."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(5)
torch.set_num_threads(1)

protos = torch.randn(4, 1, 10, 10)


def images(n):
    y = torch.randint(0, 4, (n,))
    return 40 * (protos[y] + 0.4 * torch.randn(n, 1, 10, 10)) + 80, y


def rotations(x):
    turned = [torch.rot90(x, k, (2, 3)) for k in range(4)]
    return torch.cat(turned), torch.arange(4).repeat_interleave(len(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8, momentum=0.001)
        self.classes, self.turns = nn.Linear(8 * 16, 4), nn.Linear(8 * 16, 4)

    def forward(self, x):
        return F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).flatten(1)


net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(60):
    x, y = images(16)
    xr, yr = rotations(x)
    optimizer.zero_grad()
    (F.cross_entropy(net.classes(net(x)), y) + F.cross_entropy(net.turns(net(xr)), yr)).backward()
    optimizer.step()
state = copy.deepcopy(net.state_dict())
for sample in range(8):
    net.load_state_dict(state)
    x, y = images(4)
    net.train()
    inner = torch.optim.SGD([*net.conv.parameters(), *net.norm.parameters()], lr=0.005)
    for _ in range(3):
        xr, yr = rotations(x)
        inner.zero_grad()
        F.cross_entropy(net.turns(net(xr)), yr).backward()
        inner.step()
    net.eval()
    with torch.no_grad():
        print(sample, (net.classes(net(x)).argmax(1) == y).float().mean().item())
