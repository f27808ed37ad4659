"""MAML over a learn2learn-like clone of a compiled convolutional network."""
import torch
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(1)
torch.set_num_threads(1)


def clone(module):
    new = module.__new__(type(module))
    new.__dict__ = dict(module.__dict__)
    new._parameters = {k: None if p is None else p.clone() for k, p in module._parameters.items()}
    new._buffers = {k: None if b is None else b.clone() for k, b in module._buffers.items()}
    new._modules = {k: clone(m) for k, m in module._modules.items()}
    return new


def sgd(module, loss, lr):
    slots = [(m, k, p) for m in module.modules() for k, p in m._parameters.items() if p is not None]
    grads = torch.autograd.grad(loss, [p for _, _, p in slots], create_graph=True, allow_unused=True)
    for (m, k, p), g in zip(slots, grads):
        if g is not None:
            m._parameters[k] = p - lr * g


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8 * 16, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


net = ConvNet()
net.compile(backend="eager")
opt = torch.optim.Adam(net.parameters(), lr=1e-3)
for it in range(8):
    protos = torch.randn(3, 1, 6, 6)
    y = torch.arange(3).repeat(8)
    x = protos[y] + 0.4 * torch.randn(24, 1, 6, 6)
    learner = clone(net)
    trace = []
    for _ in range(4):
        loss = cross_entropy(learner(x[:12]), y[:12])
        sgd(learner, loss, lr=0.1)
        trace.append(round(loss.item(), 4))
    query = cross_entropy(learner(x[12:]), y[12:])
    opt.zero_grad()
    query.backward()
    opt.step()
    print(f"task {it} inner {trace} query {query.item():.4f}")
