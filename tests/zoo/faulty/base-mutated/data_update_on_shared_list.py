"""FOMAML with a functional conv net: fast weights start as a list of the model's weights and are updated through .data."""
import torch
import torch.nn.functional as F

torch.manual_seed(1)
torch.set_num_threads(1)

WAYS = 4
theta = [
    (torch.randn(8, 1, 3, 3) / 3).requires_grad_(),
    torch.zeros(8, requires_grad=True),
    (torch.randn(WAYS, 8 * 16) * 0.05).requires_grad_(),
    torch.zeros(WAYS, requires_grad=True),
]
outer = torch.optim.SGD(theta, lr=1e-2)


def conv_net(x, w):
    h = F.max_pool2d(F.leaky_relu(F.conv2d(x, w[0], w[1], padding=1)), 2)
    return F.linear(h.flatten(1), w[2], w[3])


def episode():
    protos = torch.randn(WAYS, 1, 8, 8)
    y = torch.arange(WAYS).repeat(4)
    return protos[y] + 0.4 * torch.randn(16, 1, 8, 8), protos[y] + 0.4 * torch.randn(16, 1, 8, 8), y


for it in range(6):
    query_grads = [torch.zeros_like(w) for w in theta]
    line = []
    for _ in range(3):
        xs, xq, y = episode()
        fast = [w for w in theta]
        first = None
        for _ in range(4):
            loss = F.cross_entropy(conv_net(xs, fast), y)
            first = first or loss.item()
            for w, g in zip(fast, torch.autograd.grad(loss, fast)):
                w.data -= 0.05 * g
        query = F.cross_entropy(conv_net(xq, fast), y)
        for acc, g in zip(query_grads, torch.autograd.grad(query, fast)):
            acc += g / 3
        line.append(f"{first:.3f}->{loss.item():.3f}")
    outer.zero_grad()
    for w, g in zip(theta, query_grads):
        w.grad = g
    outer.step()
    print(f"it {it}:", *line)
