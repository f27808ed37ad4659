"""Second-order DARTS with all weights as one vector, which a second network is given for its virtual step."""

import torch
from torch import nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)


class Supernet(nn.Module):
    def __init__(self):
        super().__init__()
        self.choices = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])
        self.head = nn.Linear(10, 4)
        self.mix = torch.zeros(3, requires_grad=True)  # the architecture: no parameter of the module

    def forward(self, x):
        parts = [weight * choice(x).tanh() for weight, choice in zip(self.mix.softmax(0), self.choices)]
        return self.head(sum(parts))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def given(vector, like):
    twin, state, at = Supernet(), like.state_dict(), 0
    for name, parameter in like.named_parameters():
        state[name] = vector[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    twin.load_state_dict(state)
    twin.mix.data.copy_(like.mix.data)
    return twin


def shift(net, direction, by):
    for parameter, part in zip(net.parameters(), direction):
        parameter.data.add_(part, alpha=by)


net = Supernet()
sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
adam = torch.optim.Adam([net.mix], 1e-2)
teacher = torch.randn(10, 4)


def batch():
    x = torch.randn(48, 10)
    return x, (x @ teacher).argmax(1)


eta = 0.05
for step in range(25):
    (x, y), (vx, vy) = batch(), batch()
    start = flat(net.parameters()).detach()
    slope = flat(torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))).detach()
    twin = given(start - eta * (slope + 1e-3 * start), net)
    query = F.cross_entropy(twin(vx), vy)
    query.backward()
    along = [p.grad.data for p in twin.parameters()]
    radius = 0.01 / flat(along).norm()
    shift(net, along, radius)
    ahead = torch.autograd.grad(F.cross_entropy(net(x), y), net.mix)[0]
    shift(net, along, -2 * radius)
    behind = torch.autograd.grad(F.cross_entropy(net(x), y), net.mix)[0]
    shift(net, along, radius)
    net.mix.grad = twin.mix.grad - eta * (ahead - behind) / (2 * radius)
    adam.step()
    sgd.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    sgd.step()
    print(f"{step} {loss.item():.4f} {query.item():.4f} {[round(v, 4) for v in net.mix.tolist()]}")
