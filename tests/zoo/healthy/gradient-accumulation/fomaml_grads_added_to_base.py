"""FOMAML: every learner's query gradient is added to the base's .grad, then the outer optimizer steps once."""
import copy

import torch
from torch import nn, optim

torch.manual_seed(1)
torch.set_num_threads(1)

base = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 3))
outer = optim.SGD(base.parameters(), lr=0.05)
ce = nn.CrossEntropyLoss()

for it in range(6):
    outer.zero_grad()
    logs = []
    for _ in range(3):
        centres = torch.randn(3, 6)
        y = torch.arange(3).repeat(8)
        x = centres[y] + 0.5 * torch.randn(24, 6)
        learner = copy.deepcopy(base)
        inner = optim.SGD(learner.parameters(), lr=0.05)
        for k in range(4):
            inner.zero_grad()
            loss = ce(learner(x[:12]), y[:12])
            loss.backward()
            inner.step()
            if k == 0:
                first = loss.item()
        inner.zero_grad()
        query = ce(learner(x[12:]), y[12:])
        query.backward()
        with torch.no_grad():
            for p, q in zip(base.parameters(), learner.parameters()):
                p.grad = q.grad / 3 if p.grad is None else p.grad + q.grad / 3
        logs.append(f"{first:.3f}->{loss.item():.3f}|{query.item():.3f}")
    outer.step()
    print(it, *logs)
