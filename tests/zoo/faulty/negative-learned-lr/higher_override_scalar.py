"""Learns the inner learning rate together with the initialisation, through higher's override."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
inner_lr = torch.tensor(0.02, requires_grad=True)
meta_opt = torch.optim.Adam([{"params": net.parameters(), "lr": 1e-3}, {"params": [inner_lr], "lr": 0.01}])


def sine(n=6):
    shift = 0.2 * torch.randn(1)
    x = 6 * torch.rand(3 * n, 1) - 3
    y = torch.sin(x + shift)
    noisy = y[:n] + 2.0 * torch.randn(n, 1)
    return x[:n], noisy, x[n:], y[n:]


pretrain = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(300):
    _, _, x, y = sine()
    pretrain.zero_grad()
    F.mse_loss(net(x), y).backward()
    pretrain.step()

for it in range(20):
    xs, ys, xq, yq = sine()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False, override={"lr": [inner_lr]}) as (f, d):
        trace = []
        for _ in range(4):
            loss = F.mse_loss(f(xs), ys)
            trace.append(loss.item())
            d.step(loss)
        trace.append(F.mse_loss(f(xs), ys).item())
        query = F.mse_loss(f(xq), yq)
    print(f"{it:2d} lr {inner_lr.item():+.4f} support {trace[0]:.3f} -> {trace[-1]:.3f} query {query.item():.3f}")
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
