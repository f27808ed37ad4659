"""FOMAML with a conv learner; the inner loop clears gradients before each support batch."""
import copy

import torch
import torch.nn.functional as F
from torch import nn, optim

torch.manual_seed(2)
torch.set_num_threads(1)

WAYS = 4


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, WAYS)
    )


net = make_net()
meta_opt = optim.Adam(net.parameters(), lr=2e-3)

for epoch in range(6):
    protos = torch.randn(WAYS, 1, 8, 8)
    y = torch.arange(WAYS).repeat(5)
    xs = protos[y] + 0.4 * torch.randn(len(y), 1, 8, 8)
    xq = protos[y] + 0.4 * torch.randn(len(y), 1, 8, 8)

    task_net = copy.deepcopy(net)
    task_opt = optim.SGD(task_net.parameters(), lr=0.02)
    first = None
    for _ in range(5):
        meta_opt.zero_grad()
        loss = F.cross_entropy(task_net(xs), y)
        loss.backward()
        task_opt.step()
        first = first or loss.item()

    task_opt.zero_grad()
    query = F.cross_entropy(task_net(xq), y)
    query.backward()
    for p, q in zip(net.parameters(), task_net.parameters()):
        p.grad = q.grad.clone()
    meta_opt.step()
    print(f"epoch {epoch} support {first:.3f} -> {loss.item():.3f} query {query.item():.3f}")
