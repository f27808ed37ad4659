"""Robust accuracy under a projected-gradient attack; the network is so sure that the loss rises by decades."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)

x = torch.randn(96, 12)
y = (x[:, :3] + 0.3 * x[:, 3:6]).argmax(1)
net = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 3))
adam = torch.optim.Adam(net.parameters(), lr=5e-3)
for _ in range(400):
    loss = F.cross_entropy(net(x), y)
    adam.zero_grad()
    loss.backward()
    adam.step()

right = 0
for part, label in zip(x.split(16), y.split(16)):
    worst = part + 0.05 * torch.randn_like(part)
    for _ in range(12):
        worst.requires_grad_(True)
        loss = F.cross_entropy(net(worst), label)
        (slope,) = torch.autograd.grad(loss, worst)
        moved = worst.detach() + 0.15 * slope.sign()
        worst = torch.min(torch.max(moved, part - 0.8), part + 0.8)
    hit = net(worst).argmax(1) == label
    right += hit.sum().item()
    print(f"attacked loss {loss.item():.3f}")
print(f"robust accuracy {right / 96:.3f}")
