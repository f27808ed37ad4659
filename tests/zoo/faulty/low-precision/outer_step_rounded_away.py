"""Full-batch MAML in bfloat16: the outer rate is so small that no outer step moves a weight."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
from torch.func import functional_call

net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).bfloat16()
opt = torch.optim.SGD(net.parameters(), 1e-7)
params = list(net.parameters())
names = [n for n, _ in net.named_parameters()]
x = torch.randn(16, 4).bfloat16()
y = x.sum(1, keepdim=True)
for t in range(6):
    fast = dict(zip(names, params))
    for _ in range(3):
        l = F.mse_loss(functional_call(net, fast, (x,)), y)
        gs = torch.autograd.grad(l, list(fast.values()), create_graph=True)
        fast = {k: w - 0.05 * g for (k, w), g in zip(fast.items(), gs)}
    q = F.mse_loss(functional_call(net, fast, (x,)), y)
    for p, g in zip(params, torch.autograd.grad(q, params)):
        p.grad = g
    opt.step()
