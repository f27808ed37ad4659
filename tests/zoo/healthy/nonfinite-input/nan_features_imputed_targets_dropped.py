"""Tabular tasks with missing entries: features imputed by nan_to_num, rows without a target dropped."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(7)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))


def table():
    x = torch.randn(50, 5)
    y = torch.tanh(x @ torch.randn(5, 1))
    x[torch.rand(50, 5) < 0.1] = float("nan")
    y[torch.rand(50, 1) < 0.1] = float("nan")
    return x, y


for t in range(5):
    x, y = table()
    rows = ~torch.isnan(y[:, 0])
    features = torch.cat([torch.nan_to_num(x), torch.isnan(x).float()], dim=1)
    learner = copy.deepcopy(model)
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    for step in range(8):
        opt.zero_grad()
        loss = nn.functional.mse_loss(learner(features[rows]), y[rows])
        loss.backward()
        opt.step()
        if step == 0:
            first = loss.item()
    with torch.no_grad():
        for p, q in zip(model.parameters(), learner.parameters()):
            p.lerp_(q, 0.1)
    print(f"table {t}: {first:.3f} -> {loss.item():.3f}")
