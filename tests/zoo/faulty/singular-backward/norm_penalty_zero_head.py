"""MAML with a zero-initialised head and a (not squared) norm penalty on it."""
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

torch.manual_seed(1)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
nn.init.zeros_(net[2].weight)
nn.init.zeros_(net[2].bias)
opt = torch.optim.Adam(net.parameters(), lr=1e-3)


def inner_loss(params, x, y):
    return cross_entropy(functional_call(net, params, (x,)), y) + 1e-3 * params["2.weight"].norm()


for it in range(6):
    c = torch.randn(4, 8)
    y = torch.arange(4).repeat(8)
    x = c[y] + 0.4 * torch.randn(32, 8)
    params = dict(net.named_parameters())
    trace = []
    for _ in range(4):
        loss = inner_loss(params, x[:16], y[:16])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {k: p - 0.2 * g for (k, p), g in zip(params.items(), grads)}
        trace.append(round(loss.item(), 4))
    query = cross_entropy(functional_call(net, params, (x[16:],)), y[16:])
    opt.zero_grad()
    query.backward()
    print("iter", it, "inner", trace, "query", query.item(),
          "meta-gradient", sum(p.grad.norm() for p in net.parameters()).item())
    opt.step()
