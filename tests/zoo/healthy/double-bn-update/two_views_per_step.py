"""Consistency regularisation: every inner step runs the learner on two views of the support images."""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
)
meta = torch.optim.Adam(net.parameters(), lr=2e-3)
for it in range(10):
    protos = torch.randn(3, 1, 6, 6) + torch.arange(3.0).view(3, 1, 1, 1)
    y = torch.arange(3).repeat(8)
    x = protos[y] + 0.3 * torch.randn(24, 1, 6, 6)
    learner = copy.deepcopy(net)
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    for step in range(4):
        opt.zero_grad()
        a = learner(x[:12])
        b = learner(x[:12].flip(3))
        loss = F.cross_entropy(a, y[:12]) + 0.1 * F.mse_loss(a.softmax(1), b.softmax(1))
        loss.backward()
        opt.step()
    learner.zero_grad()
    query = F.cross_entropy(learner(x[12:]), y[12:])
    query.backward()
    meta.zero_grad()
    for p, q in zip(net.parameters(), learner.parameters()):
        p.grad = q.grad.clone()
    meta.step()
    print(f"task {it} support {loss.item():.3f} query {query.item():.3f}")
