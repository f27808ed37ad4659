"""Functional MAML: the checkpointed function takes the fast weights as arguments."""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
torch.set_num_threads(1)


def body(x, w1, b1, w2, b2):
    return torch.tanh(F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2))


def forward(x, p):
    return F.linear(checkpoint(body, x, *p[:4], use_reentrant=False), p[4], p[5])


theta = []
for a, b in ((1, 32), (32, 32), (32, 1)):
    theta += [(torch.randn(b, a) / a**0.5).requires_grad_(), torch.zeros(b, requires_grad=True)]
meta = torch.optim.Adam(theta, lr=2e-3)
for it in range(10):
    amp, phase = 0.5 + torch.rand(1), 3.14 * torch.rand(1)
    x = torch.rand(40, 1) * 4 - 2
    y = amp * torch.sin(2 * x + phase)
    fast = theta
    trace = []
    for _ in range(6):
        loss = F.mse_loss(forward(x[:20], fast), y[:20])
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        fast = [p - 0.03 * g for p, g in zip(fast, grads)]
        trace.append(round(loss.item(), 3))
    query = F.mse_loss(forward(x[20:], fast), y[20:])
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"iter {it} inner {trace} query {query.item():.3f}")
