"""MAML with a hinge: in some tasks every query has its margin, and the gradient is truly 0."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Linear(6, 1)
outer = torch.optim.SGD(net.parameters(), 1e-2)


def hinge(parameters, x, y, margin):
    return F.relu(margin - y * functional_call(net, parameters, (x,)).squeeze(1)).mean()


for task in range(8):
    x = torch.randn(40, 6)
    y = torch.sign(x[:, 0] + task * x[:, 1])
    parameters = dict(net.named_parameters())
    for _ in range(3):
        loss = hinge(parameters, x, y, 1.0)
        slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {n: w - 0.3 * s for (n, w), s in zip(parameters.items(), slopes)}
    query = hinge(parameters, x[:3], y[:3], -0.1)
    outer.zero_grad()
    query.backward()
    outer.step()
    print(task, query.item())
