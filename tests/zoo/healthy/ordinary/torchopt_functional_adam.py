"""Functional torchopt: adam() updates and apply_updates over a tuple of parameters, fresh state for each task."""
import torch
import torch.nn.functional as F
import torchopt

torch.manual_seed(5)
torch.set_num_threads(1)

params = (
    (torch.randn(24, 4) / 2).requires_grad_(), torch.zeros(24, requires_grad=True),
    (torch.randn(2, 24) / 24**0.5).requires_grad_(), torch.zeros(2, requires_grad=True),
)
outer = torch.optim.Adam(params, lr=1e-3)
inner = torchopt.adam(lr=5e-3, eps_root=1e-8)


def model(p, x):
    return F.linear(F.softplus(F.linear(x, p[0], p[1])), p[2], p[3])


for it in range(8):
    w = torch.randn(4)
    x = torch.randn(40, 4)
    y = (x @ w > 0).long()
    fast, state, losses = params, inner.init(params), []
    for _ in range(6):
        loss = F.cross_entropy(model(fast, x[:20]), y[:20])
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        updates, state = inner.update(grads, state, inplace=False)
        fast = torchopt.apply_updates(fast, updates, inplace=False)
    query = F.cross_entropy(model(fast, x[20:]), y[20:])
    outer.zero_grad()
    query.backward()
    outer.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
