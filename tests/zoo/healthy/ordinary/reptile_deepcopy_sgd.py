"""Reptile with SGD on deep copies, batches of support data drawn anew at each inner step."""
import copy

import torch
import torch.nn.functional as F
from torch import nn, optim

torch.manual_seed(8)
torch.set_num_threads(1)

meta = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
outer = optim.SGD(meta.parameters(), lr=0.5)
for it in range(12):
    amp, phase = 0.5 + torch.rand(1), 3.14 * torch.rand(1)
    x = 6 * torch.rand(40, 1) - 3
    y = amp * torch.sin(x + phase)
    worker = copy.deepcopy(meta)
    sgd = optim.SGD(worker.parameters(), lr=0.03)
    start = F.mse_loss(worker(x), y).item()
    for _ in range(8):
        pick = torch.randperm(40)[:20]
        sgd.zero_grad()
        F.mse_loss(worker(x[pick]), y[pick]).backward()
        sgd.step()
    end = F.mse_loss(worker(x), y).item()
    outer.zero_grad()
    with torch.no_grad():
        for p, q in zip(meta.parameters(), worker.parameters()):
            p.grad = p - q
    outer.step()
    print(f"it {it}: {start:.3f} -> {end:.3f}")
