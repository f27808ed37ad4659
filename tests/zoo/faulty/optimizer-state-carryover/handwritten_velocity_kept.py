"""FOMAML with hand-written momentum in the inner loop, conv net on parameter lists."""
import torch
import torch.nn.functional as F

torch.manual_seed(3)
torch.set_num_threads(1)

WAYS = 3
weights = [
    (torch.randn(6, 1, 3, 3) / 3).requires_grad_(),
    torch.zeros(6, requires_grad=True),
    (torch.randn(WAYS, 6 * 9) * 0.1).requires_grad_(),
    torch.zeros(WAYS, requires_grad=True),
]
velocity = [torch.zeros_like(w) for w in weights]
lr, mu = 0.02, 0.9
outer = torch.optim.Adam(weights, lr=1e-3)


def net(x, w):
    x = F.avg_pool2d(torch.relu(F.conv2d(x, w[0], w[1], padding=1)), 2)
    return F.linear(x.flatten(1), w[2], w[3])


for it in range(6):
    outer.zero_grad()
    report = []
    for _ in range(2):
        protos = torch.randn(WAYS, 1, 6, 6)
        y = torch.arange(WAYS).repeat(5)
        xs, xq = (protos[y] + 0.5 * torch.randn(len(y), 1, 6, 6) for _ in range(2))
        fast = [w.detach().clone().requires_grad_() for w in weights]
        for _ in range(4):
            loss = F.cross_entropy(net(xs, fast), y)
            grads = torch.autograd.grad(loss, fast)
            with torch.no_grad():
                for w, v, g in zip(fast, velocity, grads):
                    v.mul_(mu).add_(g)
                    w.sub_(lr * v)
        query = F.cross_entropy(net(xq, fast), y)
        for w, g in zip(weights, torch.autograd.grad(query, fast)):
            w.grad = g if w.grad is None else w.grad + g
        report.append(f"{loss.item():.3f}/{query.item():.3f}")
    outer.step()
    print("iteration", it, "support/query", *report)
