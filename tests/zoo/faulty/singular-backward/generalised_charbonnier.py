"""Conv auto-encoder adapted with a Charbonnier-like loss |e|^1.5, whose residual is exactly zero on the background."""
import torch
from torch.nn import functional as F

torch.manual_seed(3)
torch.set_num_threads(1)

k1 = (0.3 * torch.randn(6, 1, 3, 3)).requires_grad_()
k2 = (0.3 * torch.randn(1, 6, 3, 3)).requires_grad_()
weights = [k1, k2]
optim = torch.optim.Adam(weights, lr=1e-3)


def autoencode(x, w):
    return F.conv2d(F.relu(F.conv2d(x, w[0], padding=1)), w[1], padding=1)


def loss_fn(pred, target):
    return ((pred - target).abs() ** 1.5).mean()


def digits(n=8):
    x = torch.zeros(n, 1, 12, 12)
    top, left = torch.randint(1, 5, (2,))
    x[:, :, top : top + 5, left : left + 5] = torch.rand(n, 1, 5, 5)
    return x


for it in range(5):
    xs, xq = digits(), digits()
    fast = weights
    for step in range(3):
        support = loss_fn(autoencode(xs, fast), 0.5 * xs)
        grads = torch.autograd.grad(support, fast, create_graph=True)
        fast = [w - 0.2 * g for w, g in zip(fast, grads)]
    query = loss_fn(autoencode(xq, fast), 0.5 * xq)
    optim.zero_grad()
    query.backward()
    print(f"iter {it} support {support.item():.4f} query {query.item():.4f} meta-gradient {k1.grad.norm().item():.4f}")
    optim.step()
