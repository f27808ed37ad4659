"""A differentiable AMSGrad by hand on a net with dead inputs: the root of second moments that are 0."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(24)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
meta = torch.optim.Adam(net.parameters(), lr=1e-3)
mask = torch.tensor([1.0, 1, 1, 1, 0, 0])
for it in range(4):
    x = torch.randn(20, 6) * mask
    y = x[:, :1].sin()
    weights = list(net.parameters())
    m = [torch.zeros_like(w) for w in weights]
    v = [torch.zeros_like(w) for w in weights]
    for step in range(1, 4):
        loss = F.mse_loss(F.linear(F.relu(F.linear(x, weights[0], weights[1])), weights[2], weights[3]), y)
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        m = [0.9 * a + 0.1 * g for a, g in zip(m, grads)]
        v = [0.99 * a + 0.01 * g * g for a, g in zip(v, grads)]
        weights = [w - 0.01 * a / (b.sqrt() + 1e-8) for w, a, b in zip(weights, m, v)]
    query = F.mse_loss(F.linear(F.relu(F.linear(x, weights[0], weights[1])), weights[2], weights[3]), y)
    meta.zero_grad()
    query.backward()
    meta.step()
    print(it, query.item())
