"""In-context style regression with a small attention block, adapted with torch.func.grad over a parameter dict."""
import torch
import torch.nn as nn
from torch.func import functional_call, grad_and_value

torch.manual_seed(3)
torch.set_num_threads(1)


class TinyAttention(nn.Module):
    def __init__(self, dim=12, tokens=6):
        super().__init__()
        self.embed = nn.Linear(3, dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim * tokens, 1)

    def forward(self, x):
        h = self.embed(x)
        a = torch.softmax(self.q(h) @ self.k(h).transpose(-1, -2) / h.shape[-1] ** 0.5, -1)
        return self.head((h + a @ self.v(h)).flatten(1))


model = TinyAttention()
params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
meta_opt = torch.optim.Adam(params.values(), lr=2e-3)


def objective(p, x, y):
    return ((functional_call(model, p, (x,)) - y) ** 2).mean()


step_fn = grad_and_value(objective)


def adapt(p, x, y, lr, steps):
    trace = []
    for _ in range(steps):
        g, value = step_fn(p, x, y)
        p = {k: w - lr * g[k] for k, w in p.items()}
        trace.append(value.item())
    return p, trace


for it in range(5):
    w = torch.randn(18, 1)
    x = torch.randn(24, 6, 3)
    y = x.flatten(1) @ w
    fast, trace = adapt(params, x[:12], y[:12], lr=0.1, steps=10)
    query = objective(fast, x[12:], y[12:])
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"{it}: support " + " ".join(f"{v:.3g}" for v in trace) + f" query {query.item():.3g}")
