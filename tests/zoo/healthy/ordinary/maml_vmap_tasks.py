"""MAML over a batch of tasks at once with torch.func.grad and vmap."""
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

torch.manual_seed(3)
torch.set_num_threads(1)

TASKS, SHOTS = 8, 10
net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
params = dict(net.named_parameters())
opt = torch.optim.Adam(params.values(), lr=2e-3)


def loss_fn(p, x, y):
    return ((functional_call(net, p, (x,)) - y) ** 2).mean()


def one_task(p, xs, ys, xq, yq):
    values = []
    for _ in range(4):
        g, value = grad_and_value(loss_fn)(p, xs, ys)
        p = {k: w - 0.03 * g[k] for k, w in p.items()}
        values.append(value)
    return loss_fn(p, xq, yq), torch.stack(values)


for it in range(15):
    amp, phase = 0.5 + torch.rand(TASKS, 1, 1), 3.14 * torch.rand(TASKS, 1, 1)
    x = 6 * torch.rand(TASKS, 2 * SHOTS, 1) - 3
    y = amp * torch.sin(x + phase)
    batch = x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]
    query, support = vmap(one_task, in_dims=(None, 0, 0, 0, 0))(params, *batch)
    opt.zero_grad()
    query.mean().backward()
    opt.step()
    if it % 3 == 0:
        first, last = support.mean(0)[[0, -1]].tolist()
        print(f"it {it}: support {first:.4f} -> {last:.4f} query {query.mean().item():.4f}")
