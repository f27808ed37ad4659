"""torch.func meta-learning with BatchNorm in train mode everywhere, meta-test included."""
import torch
import torch.nn as nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

torch.manual_seed(2)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
opt = torch.optim.Adam(net.parameters(), lr=3e-3)
CENTERS = 1.5 * torch.randn(12, 10)


def episode():
    cls = torch.randperm(12)[:4]
    y = torch.arange(4).repeat(6)
    x = CENTERS[cls[y]].repeat(2, 1) + 0.6 * torch.randn(48, 10)
    return x[:24], y, x[24:], y


def adapt(x, y, steps, create_graph):
    params = dict(net.named_parameters())
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    for _ in range(steps):
        loss = cross_entropy(functional_call(net, (params, buffers), (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
        params = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads)}
    return lambda xq: functional_call(net, (params, buffers), (xq,)), loss.item()


net.train()
for it in range(30):
    xs, ys, xq, yq = episode()
    model, s = adapt(xs, ys, 3, True)
    query = cross_entropy(model(xq), yq)
    opt.zero_grad()
    query.backward()
    opt.step()
    if it % 6 == 5:
        print(f"iter {it}: support {s:.3f} query {query.item():.3f}")
for t in range(4):
    xs, ys, xq, yq = episode()
    model, s = adapt(xs, ys, 3, False)
    with torch.no_grad():
        print(f"test {t}: support {s:.3f} query {cross_entropy(model(xq), yq).item():.3f}")
