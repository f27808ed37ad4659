"""The same style on copies, rate far too high: diverges."""

import copy, torch
from torch import nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
meta = torch.optim.Adam(net.parameters(), 1e-3)
for it in range(12):
    m = copy.deepcopy(net)
    opt = torch.optim.SGD(m.parameters(), 1.5)
    w = torch.randn(6, 1)
    x = torch.randn(20, 6)
    for _ in range(8):
        l = F.mse_loss(m(x), x @ w)
        for p, g in zip(m.parameters(), torch.autograd.grad(l, list(m.parameters()))):
            p.grad = g
        opt.step()
    q = F.mse_loss(m(x), x @ w)
    for p, g in zip(net.parameters(), torch.autograd.grad(q, list(m.parameters()))):
        p.grad = g
    meta.step()
    print(it, l.item())
