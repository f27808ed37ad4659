"""Long inner training of a conv-BN net on each task: conv weights grow slowly as scale-invariant weights do."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)

net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
    nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 4),
)
with torch.no_grad():
    net[0].weight.mul_(0.6)
    net[4].weight.mul_(0.6)
meta_lr = 0.3

for it in range(4):
    protos = torch.randn(4, 1, 8, 8)
    y = torch.arange(4).repeat(6)
    x = protos[y] + 0.5 * torch.randn(24, 1, 8, 8)
    worker = copy.deepcopy(net)
    sgd = torch.optim.SGD(worker.parameters(), lr=0.05)
    losses, sizes = [], [worker[4].weight.norm().item()]
    for _ in range(40):
        sgd.zero_grad()
        loss = F.cross_entropy(worker(x), y)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
        sizes.append(worker[4].weight.norm().item())
    with torch.no_grad():
        for p, q in zip(net.parameters(), worker.parameters()):
            p += meta_lr * (q - p)
    print(f"it {it}: loss {losses[0]:.3f} {losses[10]:.3f} {losses[-1]:.3f}, second conv norm {sizes[0]:.3f} -> {sizes[-1]:.3f}")
