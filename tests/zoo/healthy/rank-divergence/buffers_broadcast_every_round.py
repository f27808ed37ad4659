"""First-order MAML with BatchNorm: each rank moves its statistics, rank 0's are broadcast."""
import copy

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(rank)

net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
    nn.Flatten(), nn.Linear(32, 3),
)
for tensor in net.state_dict().values():
    dist.broadcast(tensor, src=0)
outer = torch.optim.SGD(net.parameters(), lr=0.05)

for round_ in range(6):
    outer.zero_grad()
    for _ in range(2):
        y = torch.arange(3).repeat(8)
        x = torch.randn(3, 1, 8, 8)[y] + 0.2 * torch.randn(24, 1, 8, 8)
        learner = copy.deepcopy(net)
        inner = torch.optim.SGD(learner.parameters(), lr=0.05)
        for _ in range(3):
            inner.zero_grad()
            F.cross_entropy(learner(x[:12]), y[:12]).backward()
            inner.step()
        loss = F.cross_entropy(learner(x[12:]), y[12:])
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(learner.parameters()))):
            p.grad = g / 2 if p.grad is None else p.grad + g / 2
        net(x)  # the base's own statistics follow the tasks of this rank
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= world
    outer.step()
    for buffer in net.buffers():
        dist.broadcast(buffer, src=0)
dist.destroy_process_group()
