"""A learned inner step size that stays small enough, unrolled through the same landscape."""

import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
log_rate = nn.Parameter(torch.tensor(-1.0))
outer = torch.optim.SGD([log_rate], lr=1e-2)
for step in range(12):
    goal = torch.randn(8)
    weights = torch.randn(8, requires_grad=True)
    for _ in range(30):
        loss = (1 - torch.cos(weights - goal)).mean()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        weights = weights - log_rate.exp() * 8 * gradient
    outer.zero_grad()
    loss = (1 - torch.cos(weights - goal)).mean()
    loss.backward()
    outer.step()
    print(step, round(loss.item(), 3), log_rate.grad.item())
