"""Inner SGD with momentum, built anew for every task's deep copy (first-order MAML)."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

base = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
outer = torch.optim.Adam(base.parameters(), lr=2e-3)

for it in range(8):
    w = torch.randn(4, 1)
    x = torch.randn(40, 4)
    y = torch.tanh(x @ w)
    learner = copy.deepcopy(base)
    sgd = torch.optim.SGD(learner.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(6):
        sgd.zero_grad(set_to_none=True)
        loss = F.mse_loss(learner(x[:20]), y[:20])
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    query = F.mse_loss(learner(x[20:]), y[20:])
    outer.zero_grad()
    for p, g in zip(base.parameters(), torch.autograd.grad(query, list(learner.parameters()))):
        p.grad = g
    outer.step()
    print(f"{it}: {losses[0]:.3f} -> {losses[-1]:.3f}, query {query.item():.3f}")
