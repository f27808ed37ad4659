"""MAML with functional_call; the body is checkpointed to save activation memory."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 1)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


net = Net()
meta = torch.optim.Adam(net.parameters(), lr=2e-3)
for it in range(10):
    amp, phase = 0.5 + 2 * torch.rand(1), 3.14 * torch.rand(1)
    x = torch.rand(40, 1) * 4 - 2
    y = amp * torch.sin(2 * x + phase)
    params = dict(net.named_parameters())
    trace = []
    for _ in range(6):
        loss = F.mse_loss(functional_call(net, params, (x[:20],)), y[:20])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads)}
        trace.append(round(loss.item(), 3))
    query = F.mse_loss(functional_call(net, params, (x[20:],)), y[20:])
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"iter {it} inner {trace} query {query.item():.3f}")
