"""MAML over a batch of sinusoid tasks with torch.func.vmap; the loss is averaged per point and per shot."""
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

torch.manual_seed(0)
torch.set_num_threads(1)

TASKS, SHOTS = 8, 25


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
        self.out = nn.Linear(40, 1)

    def forward(self, x):
        return self.out(self.body(x))


net = Net()
params = dict(net.named_parameters())
opt = torch.optim.Adam(params.values(), lr=1e-3)


def task_loss(p, x, y):
    errors = (functional_call(net, p, (x,)) - y) ** 2
    return errors.mean() / (x.shape[0] * TASKS)


def maml_loss(p, xs, ys, xq, yq):
    fast = p
    for _ in range(3):
        g = grad(task_loss)(fast, xs, ys)
        fast = {k: fast[k] - 1e-4 * g[k] for k in fast}
    before = ((functional_call(net, p, (xq,)) - yq) ** 2).mean()
    after = ((functional_call(net, fast, (xq,)) - yq) ** 2).mean()
    return after, before


def batch():
    amp = 1 + 4 * torch.rand(TASKS, 1, 1)
    phase = 3.14 * torch.rand(TASKS, 1, 1)
    x = 10 * torch.rand(TASKS, 2 * SHOTS, 1) - 5
    y = amp * torch.sin(x + phase)
    return x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]


for it in range(20):
    after, before = vmap(maml_loss, in_dims=(None, 0, 0, 0, 0))(params, *batch())
    opt.zero_grad()
    after.mean().backward()
    opt.step()
    if it % 5 == 0:
        print(f"it {it}: before adaptation {before.mean().item():.6f} after {after.mean().item():.6f}")
