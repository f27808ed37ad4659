"""Adapts a BatchNorm conv net to several tasks at once with torch.func.vmap."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4)
)
params = dict(net.named_parameters())
buffers = dict(net.named_buffers())
meta_opt = torch.optim.Adam(params.values(), lr=1e-3)


def loss_fn(p, x, y):
    return F.cross_entropy(functional_call(net, (p, buffers), (x,)), y)


def adapt_and_test(p, xs, ys, xq, yq):
    for _ in range(3):
        g = grad(loss_fn)(p, xs, ys)
        p = {k: w - 0.1 * g[k] for k, w in p.items()}
    return loss_fn(p, xq, yq)


for it in range(5):
    protos = torch.randn(6, 4, 1, 8, 8)
    y = torch.arange(4).repeat(3).expand(6, 12)
    xs = protos[:, y[0]] + 0.3 * torch.randn(6, 12, 1, 8, 8)
    xq = protos[:, y[0]] + 0.3 * torch.randn(6, 12, 1, 8, 8)
    loss = vmap(adapt_and_test, in_dims=(None, 0, 0, 0, 0))(params, xs, y, xq, y).mean()
    meta_opt.zero_grad()
    loss.backward()
    meta_opt.step()
    print(f"it {it}: query {loss.item():.4f}")
