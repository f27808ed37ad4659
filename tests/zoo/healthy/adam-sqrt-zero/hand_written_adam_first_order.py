"""FOMAML with a hand-written Adam over fast weights: moments are kept outside the graph."""
import torch
from torch.nn import functional as F

torch.manual_seed(1)
torch.set_num_threads(1)
theta = [0.5 * torch.randn(40, 1), torch.zeros(40) - 0.3, 0.2 * torch.randn(1, 40), torch.zeros(1)]
theta = [p.requires_grad_() for p in theta]
meta = torch.optim.Adam(theta, lr=1e-2)


def forward(x, p):
    return F.linear(F.relu(F.linear(x, p[0], p[1])), p[2], p[3])


def adapt(x, y, steps=6, lr=3e-3):
    fast = list(theta)
    m = [torch.zeros_like(p) for p in theta]
    v = [torch.zeros_like(p) for p in theta]
    for t in range(1, steps + 1):
        loss = F.mse_loss(forward(x, fast), y)
        grads = torch.autograd.grad(loss, fast)
        for i, g in enumerate(grads):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            update = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            fast[i] = fast[i] - lr * update
    return fast, loss.item()


for it in range(12):
    amp, phase = 1 + torch.rand(1), 3 * torch.rand(1)
    x = torch.rand(20, 1) * 4
    y = amp * torch.sin(x + phase)
    fast, support = adapt(x[:10], y[:10])
    query = F.mse_loss(forward(x[10:], fast), y[10:])
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"it {it} support {support:.3f} query {query.item():.3f} grad {theta[0].grad.norm().item():.3f}")
