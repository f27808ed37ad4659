"""Inner loop with allow_unused=True on a model whose positional table was left out of forward."""
import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(3)
torch.set_num_threads(1)


class Encoder(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(5, dim))
        self.inp = nn.Linear(4, dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, 3)

    def forward(self, x):
        h = self.inp(x)
        weights = (self.query(h) @ self.key(h).mT / h.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ h).mean(1))


model = Encoder()
meta = torch.optim.Adam(model.parameters(), lr=2e-3)
ce = nn.CrossEntropyLoss()
for it in range(8):
    centres = torch.randn(3, 1, 4)
    y = torch.arange(3).repeat(5)
    xs, xq = (centres[y] + 0.7 * torch.randn(15, 5, 4) for _ in range(2))
    fast = dict(model.named_parameters())
    first = None
    for _ in range(4):
        loss = ce(functional_call(model, fast, (xs,)), y)
        first = first or loss.item()
        grads = torch.autograd.grad(loss, tuple(fast.values()), create_graph=True, allow_unused=True)
        fast = {k: p if g is None else p - 0.1 * g for (k, p), g in zip(fast.items(), grads)}
    query = ce(functional_call(model, fast, (xq,)), y)
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"{it}: {first:.3f} -> {loss.item():.3f} query {query.item():.3f}")
