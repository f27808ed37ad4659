"""A BatchNorm net is pretrained on a joint task, then adapted in eval mode on statistics that are sound."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(4)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


net = nn.Sequential(
    nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)
)
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(80):
    (x, y), _ = episode(12)
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
net.eval()
for task in range(8):
    (xs, ys), (xq, yq) = episode()
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(learner(xs), ys)
        inner.zero_grad()
        loss.backward()
        inner.step()
        losses.append(round(loss.item(), 3))
    with torch.no_grad():
        print(task, losses, F.cross_entropy(learner(xq), yq).item())
