"""Differentiable Adam written out for a list of fast weights; ReLU MLP on sinusoids."""
import torch
from torch.nn import functional as F

torch.manual_seed(1)
torch.set_num_threads(1)


def init(*sizes):
    params = []
    for a, b in zip(sizes, sizes[1:]):
        params += [torch.randn(b, a) * (2 / a) ** 0.5, torch.zeros(b) - 0.3]
    return [p.requires_grad_() for p in params]


def forward(x, p):
    x = F.relu(F.linear(x, p[0], p[1]))
    x = F.relu(F.linear(x, p[2], p[3]))
    return F.linear(x, p[4], p[5])


class DiffAdam:
    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        self.lr, self.betas, self.eps, self.t = lr, betas, eps, 0
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]

    def step(self, loss, params):
        grads = torch.autograd.grad(loss, params, create_graph=True)
        b1, b2 = self.betas
        self.t += 1
        self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, grads)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, grads)]
        new = []
        for p, m, v in zip(params, self.m, self.v):
            m_hat = m / (1 - b1**self.t)
            v_hat = v / (1 - b2**self.t)
            new.append(p - self.lr * m_hat / (v_hat.sqrt() + self.eps))
        return new


theta = init(1, 40, 40, 1)
meta = torch.optim.SGD(theta, lr=1e-3)
for it in range(5):
    amp, phase = 1 + 2 * torch.rand(1), 3 * torch.rand(1)
    x = torch.rand(20, 1) * 10 - 5
    y = amp * torch.sin(x + phase)
    fast, adam = theta, DiffAdam(theta, lr=5e-3)
    for _ in range(4):
        support = F.mse_loss(forward(x[:10], fast), y[:10])
        fast = adam.step(support, fast)
    query = F.mse_loss(forward(x[10:], fast), y[10:])
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"it {it} support {support.item():.3f} query {query.item():.3f} grad {theta[0].grad.norm().item():.3f}")
