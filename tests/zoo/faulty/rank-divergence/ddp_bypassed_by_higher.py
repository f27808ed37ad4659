"""DistributedDataParallel, but higher needs the module below it: no hook of DDP ever runs."""
import higher
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
torch.manual_seed(0)

net = DistributedDataParallel(nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)))
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)
tasks = torch.Generator().manual_seed(100 + rank)  # every rank draws its own


def sample():
    w = torch.randn(2, 1, generator=tasks)
    x = torch.randn(20, 2, generator=tasks)
    return x[:10], (x @ w)[:10], x[10:], (x @ w)[10:]


for iteration in range(8):
    meta_opt.zero_grad()
    for _ in range(2):
        xs, ys, xq, yq = sample()
        inner = torch.optim.SGD(net.module.parameters(), lr=0.05)
        with higher.innerloop_ctx(net.module, inner, copy_initial_weights=False) as (fast, steps):
            for _ in range(3):
                steps.step(F.mse_loss(fast(xs), ys))
            (F.mse_loss(fast(xq), yq) / 2).backward()
    meta_opt.step()
dist.barrier()
dist.destroy_process_group()
