"""Deep-copy FOMAML whose inner learning rate warms up linearly within each task, starting at 0."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(5, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 3))
meta = torch.optim.Adam(net.parameters(), lr=1e-3)
PEAK, WARMUP, STEPS = 0.1, 3, 8

for it in range(8):
    centres = torch.randn(3, 5)
    y = torch.arange(3).repeat(10)
    x = centres[y] + 0.6 * torch.randn(30, 5)
    learner = copy.deepcopy(net)
    sgd = torch.optim.SGD(learner.parameters(), lr=PEAK)
    warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda k: min(1.0, k / WARMUP))
    losses = []
    for _ in range(STEPS):
        sgd.zero_grad()
        loss = F.cross_entropy(learner(x[:15]), y[:15])
        loss.backward()
        sgd.step()
        warmup.step()
        losses.append(loss.item())
    learner.zero_grad()
    query = F.cross_entropy(learner(x[15:]), y[15:])
    query.backward()
    for p, q in zip(net.parameters(), learner.parameters()):
        p.grad = q.grad
    meta.step()
    print(f"{it}: " + " ".join(f"{v:.3f}" for v in losses) + f" query {query.item():.3f}")
