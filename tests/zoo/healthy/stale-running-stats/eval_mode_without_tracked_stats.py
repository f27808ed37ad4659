"""First-layer BN without running statistics, used under .eval() with functional fast weights."""
import torch
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)
torch.manual_seed(2)
net = nn.Sequential(
    nn.Linear(6, 32), nn.BatchNorm1d(32, track_running_stats=False), nn.Tanh(),
    nn.Linear(32, 32), nn.BatchNorm1d(32, track_running_stats=False), nn.Tanh(), nn.Linear(32, 1),
).eval()
opt = torch.optim.Adam(net.parameters(), lr=2e-3)
mse = nn.MSELoss()


def make_task():
    w = torch.randn(6, 1)
    z = torch.randn(40, 6)
    return z * 30 + 80, torch.tanh(z @ w)


for step in range(12):
    opt.zero_grad()
    for _ in range(2):
        x, y = make_task()
        fast = dict(net.named_parameters())
        for _ in range(3):
            loss = mse(functional_call(net, fast, (x[:20],)), y[:20])
            grads = torch.autograd.grad(loss, tuple(fast.values()), create_graph=True)
            fast = {k: p - 0.05 * g for (k, p), g in zip(fast.items(), grads)}
        query = mse(functional_call(net, fast, (x[20:],)), y[20:])
        (query / 2).backward()
    opt.step()
    print(f"{step}: support {loss.item():.3f} query {query.item():.3f}")
