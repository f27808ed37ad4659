"""A forgotten machine file: rank 1 adapts with ten times the inner learning rate of the others."""
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
CONFIG = {0: {"inner_lr": 0.01}, 1: {"inner_lr": 0.1}}[rank]

torch.manual_seed(3)
weights = [
    nn.Parameter(torch.randn(20, 1) * 0.5), nn.Parameter(torch.zeros(20)),
    nn.Parameter(torch.randn(1, 20) * 0.2), nn.Parameter(torch.zeros(1)),
]
meta = torch.optim.Adam(weights, lr=1e-3)
own = torch.Generator().manual_seed(rank)


def forward(x, w):
    return F.linear(torch.tanh(F.linear(x, w[0], w[1])), w[2], w[3])


for it in range(7):
    total = 0
    for _ in range(3):
        amplitude = 0.5 + torch.rand(1, generator=own)
        phase = 3 * torch.rand(1, generator=own)
        x = 4 * torch.rand(24, 1, generator=own) - 2
        y = amplitude * torch.sin(x + phase)
        fast = list(weights)
        for _ in range(5):
            grads = torch.autograd.grad(F.mse_loss(forward(x[:12], fast), y[:12]), fast, create_graph=True)
            fast = [p - CONFIG["inner_lr"] * g for p, g in zip(fast, grads)]
        total = total + F.mse_loss(forward(x[12:], fast), y[12:]) / 3
    meta.zero_grad()
    total.backward()
    for p in weights:
        dist.all_reduce(p.grad)
        p.grad /= world
    meta.step()
dist.destroy_process_group()
