"""PGD adversarial training: the inner loop climbs on purpose, sign steps on the input, eval mode for the attack."""

import torch
from torch import nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
c = torch.randn(4, 20)
for it in range(15):
    y = torch.randint(0, 4, (64,))
    x = c[y] + 0.5 * torch.randn(64, 20)
    d = torch.empty_like(x).uniform_(-0.1, 0.1)
    for _ in range(5):
        d.requires_grad_(True)
        l = F.cross_entropy(net(x + d), y)
        (g,) = torch.autograd.grad(l, d)
        d = (d.detach() + 0.05 * g.sign()).clamp(-0.3, 0.3)
    opt.zero_grad()
    l = F.cross_entropy(net(x + d), y)
    l.backward()
    opt.step()
    print(it, l.item())
