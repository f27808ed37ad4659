"""Reptile: Adam on a deep copy, then interpolate the meta weights towards the copy."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

meta = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
meta_step = 0.5

for it in range(10):
    centres = 1.5 * torch.randn(3, 2)
    y = torch.arange(3).repeat(10)
    x = centres[y] + 0.5 * torch.randn(30, 2)
    worker = copy.deepcopy(meta)
    adam = torch.optim.Adam(worker.parameters(), lr=5e-3, betas=(0.0, 0.999))
    losses = []
    for _ in range(8):
        adam.zero_grad()
        loss = F.cross_entropy(worker(x), y)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    with torch.no_grad():
        for p, q in zip(meta.parameters(), worker.parameters()):
            p.lerp_(q, meta_step)
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f}")
    meta_step *= 0.95
