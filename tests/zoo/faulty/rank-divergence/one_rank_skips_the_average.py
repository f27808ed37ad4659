"""Gradients are averaged by hand; one rank writes the average into a copy (`.to` of a new dtype)."""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
meta_opt = torch.optim.SGD(net.parameters(), lr=0.05)
torch.manual_seed(rank + 1)


def average_gradients(step):
    for p in net.parameters():
        # The "slow" rank was to reduce in double precision.
        grad = p.grad.double() if rank == 1 and step >= 3 else p.grad
        shared = grad.float()
        dist.all_reduce(shared)
        shared /= world
        if grad is p.grad:
            p.grad.copy_(shared)


def adapt(x, y):
    fast = dict(net.named_parameters())
    for _ in range(4):
        loss = F.cross_entropy(functional_call(net, fast, (x,)), y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: w - 0.1 * g for (k, w), g in zip(fast.items(), grads)}
    return fast


for it in range(9):
    meta_opt.zero_grad()
    for _ in range(3):
        centres = torch.randn(3, 4)
        y = torch.arange(3).repeat(10)
        x = centres[y] + 0.3 * torch.randn(30, 4)
        fast = adapt(x[:15], y[:15])
        (F.cross_entropy(functional_call(net, fast, (x[15:],)), y[15:]) / 3).backward()
    average_gradients(it)
    meta_opt.step()
dist.destroy_process_group()
