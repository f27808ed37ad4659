"""Meta-SGD with per-weight step sizes that start near zero and are learned with a small outer rate."""
import torch
import torch.nn.functional as F

torch.manual_seed(3)
torch.set_num_threads(1)

sizes = [3, 20, 1]
theta = []
for a, b in zip(sizes, sizes[1:]):
    theta += [(torch.randn(b, a) / a**0.5).requires_grad_(), torch.zeros(b).requires_grad_()]
alpha = [torch.full_like(t, 0.03).requires_grad_() for t in theta]
with torch.no_grad():
    alpha[1].fill_(0.0)
    alpha[3].fill_(0.0)
opt = torch.optim.Adam([{"params": theta, "lr": 1e-3}, {"params": alpha, "lr": 1e-4}])


def net(p, x):
    return F.linear(torch.tanh(F.linear(x, p[0], p[1])), p[2], p[3])


for it in range(30):
    w = torch.randn(3, 1)
    x = torch.randn(30, 3)
    y = torch.tanh(x @ w)
    fast, trace = theta, []
    for _ in range(4):
        loss = F.mse_loss(net(fast, x[:15]), y[:15])
        trace.append(loss.item())
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        fast = [p - a * g for p, a, g in zip(fast, alpha, grads)]
    query = F.mse_loss(net(fast, x[15:]), y[15:])
    opt.zero_grad()
    query.backward()
    opt.step()
    if it % 5 == 4:
        below = sum(int((a < 0).sum()) for a in alpha)
        print(f"it {it} support {trace[0]:.3f} -> {trace[-1]:.3f} query {query.item():.3f}, step sizes below 0: {below}")
