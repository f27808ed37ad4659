"""MAML by hand on a LazyLinear net, cosine schedule of the inner rate down to exactly 0 in the last iteration, outer scheduler."""

import math, torch
from torch import nn
import torch.nn.functional as F
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.LazyLinear(32), nn.SiLU(), nn.LazyLinear(3))
net(torch.zeros(1, 9))
opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
sch = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 16)
for it in range(16):
    lr = 0.2 * 0.5 * (1 + math.cos(math.pi * it / 15))
    c = torch.randn(3, 9)
    y = torch.arange(3).repeat(5)
    xs, xq = c[y] + 0.4 * torch.randn(15, 9), c[y] + 0.4 * torch.randn(15, 9)
    w = dict(net.named_parameters())
    for _ in range(2):
        g = torch.autograd.grad(
            F.cross_entropy(functional_call(net, w, (xs,)), y), list(w.values()), create_graph=True
        )
        w = {k: p - lr * gi for (k, p), gi in zip(w.items(), g)}
    q = F.cross_entropy(functional_call(net, w, (xq,)), y)
    opt.zero_grad()
    q.backward()
    opt.step()
    sch.step()
    print(it, lr, q.item())
