"""Keeps every query loss for a curve; the backward leaves the graph, for a second gradient that is logged."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(6)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(5, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 2))
adam = torch.optim.Adam(net.parameters(), lr=1e-3)
curve = []
for task in range(40):
    x = torch.randn(60, 5)
    y = x @ torch.randn(5, 2)
    fast = dict(net.named_parameters())
    for _ in range(3):
        loss = F.mse_loss(functional_call(net, fast, (x[:30],)), y[:30])
        slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: w - 0.02 * g for (k, w), g in zip(fast.items(), slopes)}
    query = F.mse_loss(functional_call(net, fast, (x[30:],)), y[30:])
    adam.zero_grad()
    query.backward(retain_graph=True)
    adam.step()
    curve.append(query)
print(f"query loss {sum(curve[:5]) / 5:.3f} -> {sum(curve[-5:]) / 5:.3f}")
