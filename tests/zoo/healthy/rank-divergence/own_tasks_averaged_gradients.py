"""Data parallel MAML: every rank has its own tasks, meta-gradients are averaged."""
import higher
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)

net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)
tasks = torch.Generator().manual_seed(100 + rank)


def sample():
    w = torch.randn(2, 1, generator=tasks)
    x = torch.randn(20, 2, generator=tasks)
    return x[:10], (x @ w)[:10], x[10:], (x @ w)[10:]


def evaluate():
    loss = 0.0
    for _ in range(2):
        xs, ys, xq, yq = sample()
        inner = torch.optim.SGD(net.parameters(), lr=0.05)
        with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (fast, steps):
            for _ in range(6):
                steps.step(F.mse_loss(fast(xs), ys))
            loss += F.mse_loss(fast(xq), yq).item() / 2
    return loss


for iteration in range(9):
    meta_opt.zero_grad()
    for _ in range(2):
        xs, ys, xq, yq = sample()
        inner = torch.optim.SGD(net.parameters(), lr=0.05)
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, steps):
            for _ in range(3):
                steps.step(F.mse_loss(fast(xs), ys))
            (F.mse_loss(fast(xq), yq) / 2).backward()
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= world
    meta_opt.step()
    if rank == 0 and iteration % 3 == 2:
        print("validation", evaluate())
dist.destroy_process_group()
