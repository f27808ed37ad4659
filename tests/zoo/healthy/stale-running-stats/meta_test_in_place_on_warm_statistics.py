"""Meta-training with higher, whose base is run forward to keep its statistics warm; meta-test steps
the net itself in eval mode, restored from a checkpoint for each task."""

import io

import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
patterns = torch.randn(4, 1, 8, 8)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(8 * 16, 4),
)  # fmt: skip
outer = torch.optim.Adam(net.parameters(), 2e-3)


def task():
    own = patterns + 0.3 * torch.randn(4, 1, 8, 8)
    y = torch.randint(0, 4, (40,))
    x = own[y] + 0.6 * torch.randn(40, 1, 8, 8)
    return x[:20], y[:20], x[20:], y[20:]


for iteration in range(40):
    outer.zero_grad()
    net.train()
    for _ in range(2):
        x, y, queries, labels = task()
        inner = torch.optim.SGD(net.parameters(), 0.05)
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, steps):
            for _ in range(3):
                steps.step(F.cross_entropy(fast(x), y))
            (F.cross_entropy(fast(queries), labels) / 2).backward()
        with torch.no_grad():
            net(torch.cat([x, queries]))
    outer.step()

checkpoint = io.BytesIO()
torch.save(net.state_dict(), checkpoint)
for _ in range(6):
    checkpoint.seek(0)
    net.load_state_dict(torch.load(checkpoint))
    net.eval()
    x, y, queries, labels = task()
    adapt = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(3):
        adapt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        adapt.step()
    print((net(queries).argmax(1) == labels).float().mean().item())
