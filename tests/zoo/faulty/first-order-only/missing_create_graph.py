"""MAML on sinusoids, weights in a list, gradients from torch.autograd.grad."""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

shapes = [(32, 1), (32,), (32, 32), (32,), (1, 32), (1,)]
theta = [(torch.randn(s) / s[-1] ** 0.5 if len(s) > 1 else torch.zeros(s)).requires_grad_() for s in shapes]
meta_opt = torch.optim.Adam(theta, lr=1e-3)


def net(x, p):
    x = torch.tanh(F.linear(x, p[0], p[1]))
    x = torch.tanh(F.linear(x, p[2], p[3]))
    return F.linear(x, p[4], p[5])


for it in range(10):
    meta_opt.zero_grad()
    logs = []
    for _ in range(2):
        x = 6 * torch.rand(20, 1) - 3
        y = (1 + torch.rand(1)) * torch.sin(x + 3 * torch.rand(1))
        fast, first = theta, None
        for _ in range(4):
            loss = F.mse_loss(net(x[:10], fast), y[:10])
            first = first or loss.item()
            grads = torch.autograd.grad(loss, fast)
            fast = [w - 0.02 * g for w, g in zip(fast, grads)]
        query = F.mse_loss(net(x[10:], fast), y[10:])
        (query / 2).backward()
        logs.append(f"{first:.3f}->{loss.item():.3f}|{query.item():.3f}")
    meta_opt.step()
    print("it", it, *logs)
