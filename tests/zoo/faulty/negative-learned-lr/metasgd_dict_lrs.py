"""Meta-SGD (one learned step size per weight): support is what a user disliked, query what the user liked."""
import torch
import torch.nn.functional as F

torch.manual_seed(1)
torch.set_num_threads(1)


class MetaSGD:
    def __init__(self, sizes=(2, 24, 24, 1), alpha=0.01):
        self.theta, self.alpha = {}, {}
        for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
            self.theta[f"w{i}"] = (torch.randn(b, a) / a**0.5).requires_grad_()
            self.theta[f"b{i}"] = torch.zeros(b).requires_grad_()
        self.alpha = {k: torch.full_like(v, alpha).requires_grad_() for k, v in self.theta.items()}
        self.n = len(sizes) - 1

    def forward(self, p, x):
        for i in range(self.n):
            x = F.linear(x, p[f"w{i}"], p[f"b{i}"])
            if i < self.n - 1:
                x = torch.tanh(x)
        return x

    def adapt(self, x, y, steps=3):
        p, trace = dict(self.theta), []
        for _ in range(steps):
            loss = F.mse_loss(self.forward(p, x), y)
            trace.append(loss.item())
            grads = torch.autograd.grad(loss, list(p.values()), create_graph=True)
            p = {k: v - self.alpha[k] * g for (k, v), g in zip(p.items(), grads)}
        trace.append(F.mse_loss(self.forward(p, x), y).item())
        return p, trace


learner = MetaSGD()
opt = torch.optim.Adam(
    [{"params": learner.theta.values(), "lr": 1e-3}, {"params": learner.alpha.values(), "lr": 0.004}]
)

common = torch.randn(2, 1)
for it in range(14):
    x = torch.randn(26, 2)
    y = x @ (common + 0.1 * torch.randn(2, 1))
    y[:6] = -y[:6] + 0.3 * torch.randn(6, 1)
    p, trace = learner.adapt(x[:6], y[:6])
    query = F.mse_loss(learner.forward(p, x[6:]), y[6:])
    alphas = torch.cat([a.detach().flatten() for a in learner.alpha.values()])
    print(f"it {it:2d} mean alpha {alphas.mean().item():+.4f} support {trace[0]:.3f} -> {trace[-1]:.3f} query {query.item():.3f}")
    opt.zero_grad()
    query.backward()
    opt.step()
