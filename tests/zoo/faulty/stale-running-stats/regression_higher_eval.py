"""Meta-learned regression with BatchNorm1d and higher; the final evaluation calls eval() on a base whose statistics no batch has moved."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(34)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
meta = torch.optim.Adam(net.parameters(), lr=2e-3)
inner = torch.optim.SGD(net.parameters(), lr=0.05)


def task():
    w = torch.randn(3, 1)
    x = 20 * torch.rand(32, 3) + 30
    y = torch.sin(((x - 40) / 6) @ w)
    return x[:16], y[:16], x[16:], y[16:]


def adapt(train):
    xs, ys, xq, yq = task()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=not train, track_higher_grads=train) as (f, opt):
        for _ in range(4):
            opt.step(F.mse_loss(f(xs), ys))
        query = F.mse_loss(f(xq), yq)
        if train:
            query.backward()
    return query.item()


for it in range(8):
    meta.zero_grad()
    print(it, sum(adapt(True) for _ in range(2)) / 2)
    meta.step()
net.eval()
for it in range(3):
    print("test", adapt(False))
