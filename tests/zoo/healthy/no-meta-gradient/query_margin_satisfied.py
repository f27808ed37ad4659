"""First-order MAML of two-class nets: late in training every query margin is satisfied, and the gradient is exactly zero."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(7)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
meta = torch.optim.SGD(net.parameters(), lr=0.1)


def episode():
    y = torch.arange(2).repeat(10)
    x = torch.where(y[:, None] == 0, -2.0, 2.0) + 0.2 * torch.randn(20, 6)
    return (x[:10], y[:10]), (x[10:], y[10:])


for it in range(10):
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        (xs, ys), (xq, yq) = episode()
        learner = copy.deepcopy(net)
        inner = torch.optim.SGD(learner.parameters(), lr=0.1)
        for _ in range(6):
            inner.zero_grad()
            F.multi_margin_loss(learner(xs), ys, margin=0.5).backward()
            inner.step()
        inner.zero_grad()
        query = F.multi_margin_loss(learner(xq), yq, margin=0.5)
        query.backward()
        for p, q in zip(net.parameters(), learner.parameters()):
            p.grad += q.grad / 3
    meta.step()
    print(it, query.item())
