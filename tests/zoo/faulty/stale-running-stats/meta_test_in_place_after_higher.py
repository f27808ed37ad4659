"""Meta-training with higher in train mode; meta-test steps the net itself, put back for each task,
in eval mode: with running statistics that no batch of meta-training has reached."""

import copy

import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
centres = 5 * torch.randn(4, 10)
net = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
outer = torch.optim.Adam(net.parameters(), 5e-3)


def batch(n=20):
    y = torch.randint(0, 4, (n,))
    return 6 + 4 * (centres[y] + torch.randn(n, 10)), y


for iteration in range(12):
    outer.zero_grad()
    (x, y), (queries, labels) = batch(), batch()
    inner = torch.optim.SGD(net.parameters(), 0.1)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, steps):
        for _ in range(3):
            steps.step(F.cross_entropy(fast(x), y))
        F.cross_entropy(fast(queries), labels).backward()
    outer.step()

trained = copy.deepcopy(net.state_dict())
net.eval()
for task in range(6):
    net.load_state_dict(trained)
    (x, y), (queries, labels) = batch(), batch()
    adapt = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        adapt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        adapt.step()
    with torch.no_grad():
        print(task, F.cross_entropy(net(queries), labels).item())
