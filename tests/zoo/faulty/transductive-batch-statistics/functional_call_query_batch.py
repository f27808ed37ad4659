"""Few-shot classification with functional_call, BN in train mode and per-task buffers, then a test phase."""
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

torch.manual_seed(1)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
opt = torch.optim.Adam(net.parameters(), lr=2e-3)


def episode():
    c = 1.5 * torch.randn(4, 8)
    y = torch.arange(4).repeat(6)
    return c[y] + 0.7 * torch.randn(24, 8), c[y] + 0.7 * torch.randn(24, 8), y


def run(xs, xq, y, create_graph):
    params = dict(net.named_parameters())
    buffers = {k: b.clone() for k, b in net.named_buffers()}
    for _ in range(4):
        loss = cross_entropy(functional_call(net, (params, buffers), (xs,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
        params = {k: p - 0.2 * g for (k, p), g in zip(params.items(), grads)}
    return functional_call(net, (params, buffers), (xq,)), loss.item()


for it in range(15):
    xs, xq, y = episode()
    logits, support = run(xs, xq, y, True)
    query = cross_entropy(logits, y)
    opt.zero_grad()
    query.backward()
    opt.step()
    print(f"train {it} support {support:.3f} query {query.item():.3f}")
for it in range(4):
    xs, xq, y = episode()
    with torch.enable_grad():
        logits, support = run(xs, xq, y, False)
    print(f"test {it} support {support:.3f} acc {(logits.argmax(1) == y).float().mean().item():.2f}")
