"""MAML with torch.func.grad on a net in eval mode whose BatchNorm has seen no batch."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 5))
outer = torch.optim.Adam(net.parameters(), 1e-3)
net.eval()


def loss(parameters, buffers, x, y):
    return F.cross_entropy(functional_call(net, (parameters, buffers), (x,)), y)


for task in range(8):
    parameters = dict(net.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    x, y = 30 * torch.randn(40, 6), torch.randint(0, 5, (40,))
    for _ in range(3):
        gradients = grad(loss)(parameters, buffers, x, y)
        parameters = {n: w - 0.1 * gradients[n] for n, w in parameters.items()}
    query = loss(parameters, buffers, x, y)
    outer.zero_grad()
    query.backward()
    outer.step()
    print(task, query.item())
