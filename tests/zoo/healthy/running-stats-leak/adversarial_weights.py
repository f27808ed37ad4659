"""Adversarial training with perturbed inputs and weights: a proxy loads the model and climbs once."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)


def difference(model, proxy):
    found = {}
    for (name, old), new in zip(model.state_dict().items(), proxy.state_dict().values()):
        if old.dim() > 1 and "weight" in name:
            way = new - old
            found[name] = old.norm() / (way.norm() + 1e-20) * way
    return found


@torch.no_grad()
def add(model, ways, share):
    for name, parameter in model.named_parameters():
        if name in ways:
            parameter.add_(share * ways[name])


class AdversarialWeights:
    def __init__(self, model, share, lr):
        self.model, self.share = model, share
        self.proxy = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.proxy.parameters(), lr=lr)

    def ways(self, x, y):
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        loss = -F.cross_entropy(self.proxy(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return difference(self.model, self.proxy)


def attack(model, x, y, steps=5, step=0.02, bound=0.1):
    moved = (x + 0.001 * torch.randn_like(x)).detach()
    for _ in range(steps):
        moved.requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(moved), y), [moved])[0]
        moved = moved.detach() + step * gradient.sign()
        moved = torch.min(torch.max(moved, x - bound), x + bound)
    return moved.detach()


net = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
weights = AdversarialWeights(net, share=0.01, lr=0.01)
teacher = torch.randn(10, 3)
for batch in range(40):
    x = torch.randn(64, 10)
    y = (x @ teacher).argmax(1)
    net.train()
    attacked = attack(net, x, y)
    ways = weights.ways(attacked, y)
    add(net, ways, weights.share)
    loss = F.cross_entropy(net(attacked), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    add(net, ways, -weights.share)
    if batch % 10 == 0:
        print(f"batch {batch}: robust loss {loss.item():.3f}")
