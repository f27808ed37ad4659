"""Meta-learns a start on the top of a hill: twenty calm steps down from there; the meta-gradient is clipped."""
import math

import torch

torch.manual_seed(5)
torch.set_num_threads(1)

start = torch.nn.Parameter(math.pi + 1e-5 * torch.randn(10))
sgd = torch.optim.SGD([start], lr=1e-5)

for outer in range(8):
    sgd.zero_grad()
    for _ in range(2):
        where, z = 0.5 * torch.randn(10), start
        for _ in range(20):
            (slope,) = torch.autograd.grad((1 - z.cos()).sum(), z, create_graph=True)
            z = z - 0.6 * slope
        query = (1 - (z - where).cos()).sum()
        query.backward()
    torch.nn.utils.clip_grad_norm_([start], 1.0)
    sgd.step()
    print(f"outer step {outer}: query loss {query.item():.4f}")
