"""First-order MAML with one learner that is given the base's parameters before every task."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(6)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


net = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
learner = copy.deepcopy(net)
meta = torch.optim.Adam(net.parameters(), lr=2e-3)
for it in range(8):
    meta.zero_grad()
    for _ in range(3):
        (xs, ys), (xq, yq) = episode()
        with torch.no_grad():
            for p, q in zip(learner.parameters(), net.parameters()):
                p.copy_(q)
        inner = torch.optim.SGD(learner.parameters(), lr=0.1)
        for _ in range(3):
            inner.zero_grad()
            F.cross_entropy(learner(xs), ys).backward()
            inner.step()
        inner.zero_grad()
        query = F.cross_entropy(learner(xq), yq)
        query.backward()
        for p, q in zip(net.parameters(), learner.parameters()):
            p.grad = q.grad / 3 if p.grad is None else p.grad + q.grad / 3
    meta.step()
    print(it, query.item())
