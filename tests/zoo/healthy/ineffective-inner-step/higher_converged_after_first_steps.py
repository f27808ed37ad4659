"""A linear probe whose inner loop converges in the first few of twenty steps; meta-trained with higher."""
import higher
import torch
from torch import nn
import torch.nn.functional as F

torch.manual_seed(3)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 3, bias=False))
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-2)

for it in range(5):
    target = torch.eye(3) + 0.3 * torch.randn(3, 3)
    basis = torch.linalg.qr(torch.randn(12, 3))[0] * 12**0.5
    x, y = basis, basis @ target
    xq = torch.randn(12, 3)
    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=1.0), copy_initial_weights=False) as (f, d):
        losses = []
        for _ in range(20):
            loss = F.mse_loss(f(x), y)
            d.step(loss)
            losses.append(loss.item())
        query = F.mse_loss(f(xq), xq @ target)
    meta_opt.zero_grad()
    (query + 1e-3 * net[0].weight.pow(2).sum()).backward()
    meta_opt.step()
    print(it, f"support {losses[0]:.3f} {losses[5]:.2e} {losses[-1]:.2e} query {query.item():.2e}")
