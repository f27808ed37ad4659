"""MAML by hand on a list of weights; meta-tests run between outer steps on a deep copy of the whole learner."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(26)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(
            [0.2 * torch.randn(24, 12), torch.zeros(24), 0.2 * torch.randn(4, 24), torch.zeros(4)]
        )
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, w=None):
        w = w or list(self.weights)
        return self.scale * F.linear(F.relu(F.linear(x, w[0], w[1])), w[2], w[3])

    def parameters(self, recurse=True):
        return iter(self.weights)


def adapt(net, x, y, create_graph):
    w = list(net.parameters())
    for _ in range(3):
        grads = torch.autograd.grad(F.cross_entropy(net(x, w), y), w, create_graph=create_graph)
        w = [p - 0.1 * g for p, g in zip(w, grads)]
    return w


learner = Learner()
meta = torch.optim.Adam(learner.parameters(), lr=2e-3)
for it in range(9):
    (xs, ys), (xq, yq) = episode()
    query = F.cross_entropy(learner(xq, adapt(learner, xs, ys, True)), yq)
    meta.zero_grad()
    query.backward()
    meta.step()
    if it % 3 == 0:
        for _ in range(2):
            (xs, ys), (xq, yq) = episode()
            trial = copy.deepcopy(learner)
            print(it, F.cross_entropy(trial(xq, adapt(trial, xs, ys, False)), yq).item())
