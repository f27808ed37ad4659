"""FOMAML on deep copies; inner gradient norms are clipped at 10, which an occasional outlier reaches."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

base = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1))
outer = torch.optim.Adam(base.parameters(), lr=1e-3)
norms = []
for it in range(12):
    x = torch.randn(32, 3)
    y = x @ torch.randn(3, 1) * (6.0 if it == 5 else 1.0)
    learner = copy.deepcopy(base)
    sgd = torch.optim.SGD(learner.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        sgd.zero_grad()
        loss = F.mse_loss(learner(x[:16]), y[:16])
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(learner.parameters(), 10.0).item())
        sgd.step()
        losses.append(loss.item())
    query = F.mse_loss(learner(x[16:]), y[16:])
    for p, g in zip(base.parameters(), torch.autograd.grad(query, list(learner.parameters()))):
        p.grad = g
    outer.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
print(f"clipped {sum(n > 10 for n in norms)} of {len(norms)} steps")
