"""Adapts a regression net per task with Adam written out by hand; parameters live in a dict."""
import torch
import torch.nn.functional as F

torch.manual_seed(8)
torch.set_num_threads(1)


def init_params():
    sizes = [6, 24, 24, 1]
    params = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        params[f"w{i}"] = (torch.randn(b, a) / a**0.5).requires_grad_()
        params[f"b{i}"] = torch.zeros(b).requires_grad_()
    return params


def forward(params, x):
    x = F.silu(F.linear(x, params["w0"], params["b0"]))
    x = F.silu(F.linear(x, params["w1"], params["b1"]))
    return F.linear(x, params["w2"], params["b2"])


class InnerAdam:
    def __init__(self, lr, betas=(0.9, 0.99), eps=1e-8):
        self.lr, self.betas, self.eps = lr, betas, eps
        self.t, self.m, self.v = 0, {}, {}

    def step(self, params, grads):
        self.t += 1
        b1, b2 = self.betas
        out = {}
        for k, p in params.items():
            g = grads[k]
            self.m[k] = b1 * self.m.get(k, 0.0) + (1 - b1) * g
            self.v[k] = b2 * self.v.get(k, 0.0) + (1 - b2) * g * g
            m_hat = self.m[k] / (1 - b1**self.t)
            v_hat = self.v[k] / (1 - b2**self.t)
            out[k] = p - self.lr * m_hat / (v_hat + self.eps).sqrt()
        return out


params = init_params()
meta = torch.optim.Adam(params.values(), lr=1e-3)
for it in range(4):
    x = torch.randn(32, 6)
    y = torch.sin(x @ torch.randn(6, 1))
    fast, opt, curve = params, InnerAdam(lr=2.0), []
    for _ in range(8):
        loss = F.mse_loss(forward(fast, x[:16]), y[:16])
        grads = dict(zip(fast, torch.autograd.grad(loss, list(fast.values()), create_graph=True)))
        fast = opt.step(fast, grads)
        curve.append(loss.item())
    query = F.mse_loss(forward(fast, x[16:]), y[16:])
    meta.zero_grad()
    query.backward()
    meta.step()
    print(it, " ".join(f"{c:.3g}" for c in curve), f"query {query.item():.3g}")
