"""Unrolls a well-conditioned inner problem further and further: the meta-gradient settles."""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

w0 = torch.randn(5, 1).requires_grad_()
b0 = torch.zeros(1, requires_grad=True)
outer = torch.optim.Adam([w0, b0], lr=1e-2)

for it, unroll in enumerate([5, 10, 20, 40, 80, 120]):
    truth = torch.randn(5, 1)
    x = torch.randn(40, 5)
    y = x @ truth + 0.1 * torch.randn(40, 1)
    w, b = w0, b0
    first = None
    for _ in range(unroll):
        loss = F.mse_loss(x[:20] @ w + b, y[:20]) + 0.01 * (w - w0).pow(2).sum()
        first = first or loss.item()
        gw, gb = torch.autograd.grad(loss, (w, b), create_graph=True)
        w, b = w - 0.1 * gw, b - 0.1 * gb
    query = F.mse_loss(x[20:] @ w + b, y[20:])
    outer.zero_grad()
    query.backward()
    print(f"unroll {unroll}: {first:.3f} -> {loss.item():.4f} query {query.item():.4f} meta-gradient {w0.grad.norm().item():.4f}")
    outer.step()
