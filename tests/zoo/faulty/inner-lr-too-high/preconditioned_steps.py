"""Preconditioned inner steps by a fixed matrix with eigenvalues far too large: diverges."""

import torch
from torch import nn
import torch.nn.functional as F
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))
M = {k: 2.5 * torch.eye(p.shape[0]) for k, p in net.named_parameters()}
opt = torch.optim.Adam(net.parameters(), 1e-3)
for it in range(10):
    x = torch.randn(40, 5)
    y = x @ torch.randn(5, 1)
    w = dict(net.named_parameters())
    for _ in range(8):
        g = torch.autograd.grad(
            F.mse_loss(functional_call(net, w, (x[:20],)), y[:20]), list(w.values()), create_graph=True
        )
        w = {k: v - (M[k] @ gi) for (k, v), gi in zip(w.items(), g)}
    q = F.mse_loss(functional_call(net, w, (x[20:],)), y[20:])
    opt.zero_grad()
    q.backward()
    opt.step()
    print(it, q.item())
