"""Trains a MAML initialisation with small inner steps, then evaluates with a bolder step size for faster adaptation."""
import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(9)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)


def task():
    a = torch.randn(8, 4) / 8**0.5
    x = torch.randn(40, 8)
    y = torch.tanh(x @ a)
    return x[:20], y[:20], x[20:], y[20:]


def adapt(params, x, y, lr, steps, second_order):
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(functional_call(net, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=second_order)
        params = {n: p - lr * g for (n, p), g in zip(params.items(), grads)}
        losses.append(loss.item())
    return params, losses


for it in range(15):
    xs, ys, xq, yq = task()
    fast, _ = adapt(dict(net.named_parameters()), xs, ys, lr=0.05, steps=3, second_order=True)
    loss = nn.functional.mse_loss(functional_call(net, fast, (xq,)), yq)
    meta_opt.zero_grad()
    loss.backward()
    meta_opt.step()
    if it % 5 == 4:
        print(f"train {it}: {loss.item():.4f}")

for n in range(3):
    xs, ys, xq, yq = task()
    fast, losses = adapt(dict(net.named_parameters()), xs, ys, lr=2.2, steps=20, second_order=False)
    with torch.no_grad():
        test = nn.functional.mse_loss(functional_call(net, fast, (xq,)), yq)
    print(f"test {n}: support {losses[0]:.3f} {losses[4]:.3g} {losses[-1]:.3g} query {test.item():.3g}")
