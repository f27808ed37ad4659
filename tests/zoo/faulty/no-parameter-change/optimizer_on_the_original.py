"""First-order MAML for a conv net: each task adapts a deep copy with SGD."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)

WAYS, SHOTS = 4, 4
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, WAYS)
)
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)

for task in range(8):
    protos = torch.randn(WAYS, 1, 8, 8)
    y = torch.arange(WAYS).repeat(SHOTS)
    xs = protos[y] + 0.4 * torch.randn(len(y), 1, 8, 8)
    xq = protos[y] + 0.4 * torch.randn(len(y), 1, 8, 8)

    meta_opt.zero_grad()
    learner = copy.deepcopy(model)
    inner_opt = torch.optim.SGD(model.parameters(), lr=0.05)
    trace = []
    for _ in range(5):
        learner.zero_grad()
        loss = F.cross_entropy(learner(xs), y)
        loss.backward()
        inner_opt.step()
        trace.append(loss.item())
    learner.zero_grad()
    query = F.cross_entropy(learner(xq), y)
    query.backward()
    for p, q in zip(model.parameters(), learner.parameters()):
        p.grad = q.grad
    meta_opt.step()
    print(f"task {task}: support {trace[0]:.4f} -> {trace[-1]:.4f} query {query.item():.4f}")
