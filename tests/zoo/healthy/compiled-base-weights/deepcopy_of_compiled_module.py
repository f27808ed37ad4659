"""First-order MAML on deep copies of a module compiled with module.compile()."""
from copy import deepcopy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(5)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
net.compile(backend="eager")
meta = torch.optim.Adam(net.parameters(), lr=2e-3)

for task in range(8):
    centers = torch.randn(4, 10)
    y = torch.arange(4).repeat(10)
    x = centers[y] + 0.4 * torch.randn(40, 10)
    learner = deepcopy(net)
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    trace = []
    for step in range(5):
        opt.zero_grad()
        loss = cross_entropy(learner(x[:20]), y[:20])
        loss.backward()
        opt.step()
        trace.append(round(loss.item(), 3))
    learner.zero_grad()
    query = cross_entropy(learner(x[20:]), y[20:])
    query.backward()
    for p, q in zip(net.parameters(), learner.parameters()):
        p.grad = q.grad
    meta.step()
    print(f"task {task} {trace} query {query.item():.3f}")
