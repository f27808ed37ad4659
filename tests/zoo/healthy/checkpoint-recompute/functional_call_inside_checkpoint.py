"""MAML where functional_call happens inside the checkpointed function, so that a re-run swaps the same weights in."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

torch.manual_seed(4)
torch.set_num_threads(1)
body = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
head = nn.Linear(32, 1)
meta = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)


def run_body(params, x):
    return functional_call(body, params, (x,))


for it in range(10):
    w = torch.randn(6, 1)
    x = torch.randn(40, 6)
    y = torch.tanh(x @ w)
    fb, fh = dict(body.named_parameters()), dict(head.named_parameters())
    for _ in range(4):
        h = checkpoint(run_body, fb, x[:20], use_reentrant=False)
        loss = F.mse_loss(functional_call(head, fh, (h,)), y[:20])
        grads = iter(torch.autograd.grad(loss, [*fb.values(), *fh.values()], create_graph=True))
        fb = {k: p - 0.1 * next(grads) for k, p in fb.items()}
        fh = {k: p - 0.1 * next(grads) for k, p in fh.items()}
    h = checkpoint(run_body, fb, x[20:], use_reentrant=False)
    query = F.mse_loss(functional_call(head, fh, (h,)), y[20:])
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"iter {it} support {loss.item():.4f} query {query.item():.4f}")
