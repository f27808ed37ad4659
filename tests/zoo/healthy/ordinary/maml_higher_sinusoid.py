"""The classic: MAML with higher on sinusoid regression."""
import math

import higher
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)


def sample(n=10):
    amplitude = 0.5 + 1.5 * torch.rand(1)
    phase = math.pi * torch.rand(1)
    x = 10 * torch.rand(2 * n, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return x[:n], y[:n], x[n:], y[n:]


for it in range(12):
    meta_opt.zero_grad()
    gains, queries = [], []
    for _ in range(3):
        xs, ys, xq, yq = sample()
        inner_opt = torch.optim.SGD(net.parameters(), lr=0.01)
        with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            losses = []
            for _ in range(5):
                loss = F.mse_loss(fnet(xs), ys)
                losses.append(loss.item())
                diffopt.step(loss)
            query = F.mse_loss(fnet(xq), yq)
            (query / 3).backward()
        gains.append(losses[0] - losses[-1])
        queries.append(query.item())
    meta_opt.step()
    print(f"it {it}: query {sum(queries) / 3:.3f} support gain {sum(gains) / 3:.3f}")
