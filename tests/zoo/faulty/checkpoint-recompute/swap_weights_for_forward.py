"""Hand-written inner loop: fast weights are swapped into the module for the forward, then the originals go back."""
import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

torch.manual_seed(1)
torch.set_num_threads(1)


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList([ResidualBlock(8), ResidualBlock(8)])
        self.fc = nn.Linear(8 * 9, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.fc(torch.max_pool2d(x, 2).flatten(1))


@contextlib.contextmanager
def using(module, weights):
    slots = []
    for name, w in weights.items():
        owner, _, leaf = name.rpartition(".")
        m = module.get_submodule(owner)
        slots.append((m, leaf, m._parameters[leaf]))
        m._parameters[leaf] = w
    try:
        yield module
    finally:
        for m, leaf, p in slots:
            m._parameters[leaf] = p


net = Net()
loss_fn = nn.CrossEntropyLoss()
for task in range(5):
    protos = torch.randn(3, 1, 6, 6)
    y = torch.arange(3).repeat(8)
    x = protos[y] + 0.4 * torch.randn(24, 1, 6, 6)
    weights = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    for step in range(6):
        with using(net, weights):
            loss = loss_fn(net(x[:12]), y[:12])
        grads = torch.autograd.grad(loss, list(weights.values()))
        weights = {k: (w - 0.03 * g).detach().requires_grad_() for (k, w), g in zip(weights.items(), grads)}
        print(f"task {task} step {step} loss {loss.item():.4f}")
    with torch.no_grad(), using(net, weights):
        print(f"task {task} query {loss_fn(net(x[12:]), y[12:]).item():.4f}")
