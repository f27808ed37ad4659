"""Trains with FOMAML, then fails to append to a results file whose folder is not there."""
import copy
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1))
outer = torch.optim.Adam(net.parameters(), lr=2e-3)
results = []
for it in range(8):
    x = torch.randn(30, 3)
    y = torch.tanh(x @ torch.randn(3, 1))
    learner = copy.deepcopy(net)
    sgd = torch.optim.SGD(learner.parameters(), lr=0.05)
    for _ in range(5):
        sgd.zero_grad()
        loss = F.mse_loss(learner(x[:15]), y[:15])
        loss.backward()
        sgd.step()
    query = F.mse_loss(learner(x[15:]), y[15:])
    outer.zero_grad()
    for p, g in zip(net.parameters(), torch.autograd.grad(query, list(learner.parameters()))):
        p.grad = g
    outer.step()
    results.append(query.item())
    print(f"it {it}: support {loss.item():.4f} query {query.item():.4f}")

with pathlib.Path("/nonexistent-results-folder/run.csv").open("a") as f:
    f.write(",".join(map(str, results)))
