"""Meta-Curvature: learned matrices transform each layer's gradient before the step."""

import torch
from torch import nn
import torch.nn.functional as F
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
M = {k: nn.Parameter(torch.eye(p.shape[0])) for k, p in net.named_parameters()}
opt = torch.optim.Adam([*net.parameters(), *M.values()], 1e-3)
for it in range(10):
    tot = 0
    for _ in range(2):
        a, p = torch.rand(1) * 4, torch.rand(1) * 3
        x = torch.rand(20, 1) * 10 - 5
        y = a * torch.sin(x + p)
        w = dict(net.named_parameters())
        for _ in range(3):
            g = torch.autograd.grad(
                F.mse_loss(functional_call(net, w, (x[:10],)), y[:10]), list(w.values()), create_graph=True
            )
            w = {k: v - 0.01 * (M[k] @ gi) for (k, v), gi in zip(w.items(), g)}
        tot = tot + F.mse_loss(functional_call(net, w, (x[10:],)), y[10:])
    opt.zero_grad()
    tot.backward()
    opt.step()
    print(it, tot.item())
