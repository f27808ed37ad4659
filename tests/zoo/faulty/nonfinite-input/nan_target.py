"""torch.func MAML for regression; the targets of one task come from a division."""
import torch
from torch import nn
from torch.func import functional_call, grad_and_value

torch.manual_seed(4)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1))
params = dict(net.named_parameters())
outer = torch.optim.Adam(net.parameters(), lr=1e-3)


def loss_fn(p, x, y):
    return ((functional_call(net, p, (x,)) - y) ** 2).mean()


def ratio_task(seed):
    x = torch.rand(20, 2) + 0.5
    if seed == 3:
        x[0] = 0.0
    return x, x[:, :1] / x[:, 1:]


for t in range(6):
    x, y = ratio_task(t)
    fast = params
    for _ in range(3):
        grads, loss = grad_and_value(loss_fn)(fast, x[:10], y[:10])
        fast = {k: fast[k] - 0.05 * grads[k] for k in fast}
    query = loss_fn(fast, x[10:], y[10:])
    outer.zero_grad()
    query.backward()
    outer.step()
    print(t, "support", loss.item(), "query", query.item())
