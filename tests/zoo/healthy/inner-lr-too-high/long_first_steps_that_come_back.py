"""Absolute errors: a step of fixed length promises more than there is near the bottom, and the
loss of the first steps is higher; the rate falls, and the loop ends below where it began."""

import torch
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Linear(8, 1)
outer = torch.optim.Adam(net.parameters(), lr=1e-3)
truth = torch.randn(8, 1)
net.weight.data = truth.T.clone()
for task in range(8):
    x = torch.randn(40, 8)
    y = x @ (truth + 0.02 * torch.randn(8, 1))
    fast = dict(net.named_parameters())
    for step in range(8):
        loss = (functional_call(net, fast, (x,)) - y).abs().mean()
        slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {n: w - 0.2 * 0.4**step * s for (n, w), s in zip(fast.items(), slopes)}
    query = (functional_call(net, fast, (x,)) - y).abs().mean()
    outer.zero_grad()
    query.backward()
    outer.step()
    print(task, query.item())
