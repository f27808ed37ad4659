"""One sample a class, two classes: BatchNorm over two values a channel, under torch.func.grad."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 2)
)
outer = torch.optim.Adam(net.parameters(), 1e-3)


def loss(parameters, x, y):
    return F.cross_entropy(functional_call(net, parameters, (x,)), y)


for task in range(8):
    parameters = dict(net.named_parameters())
    x, y = torch.randn(2, 5), torch.tensor([0, 1])
    queries, labels = torch.randn(10, 5), torch.randint(0, 2, (10,))
    for _ in range(3):
        gradients = grad(loss)(parameters, x, y)
        parameters = {n: w - 0.1 * gradients[n] for n, w in parameters.items()}
    query = loss(parameters, queries, labels)
    outer.zero_grad()
    query.backward()
    outer.step()
    print(task, query.item())
