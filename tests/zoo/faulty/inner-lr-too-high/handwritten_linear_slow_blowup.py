"""Meta-learned prior for ridge-free linear probes on fixed random features; long inner loop."""
import torch

torch.manual_seed(4)
torch.set_num_threads(1)

D, N = 30, 40
features = torch.randn(5, D) * 0.7


def phi(x):
    return torch.relu(x @ features)


weight = torch.zeros(D, 1, requires_grad=True)
bias = torch.zeros(1, requires_grad=True)
prior_opt = torch.optim.Adam([weight, bias], lr=1e-3)


def fit(x, y, lr=0.11, steps=40):
    w, b = weight, bias
    z = phi(x)
    losses = []
    for _ in range(steps):
        loss = (z @ w + b - y).pow(2).mean()
        gw, gb = torch.autograd.grad(loss, (w, b), create_graph=True)
        w = w - lr * gw
        b = b - lr * gb
        losses.append(loss.item())
    return w, b, losses


for episode in range(4):
    direction = torch.randn(5, 1)
    x = torch.randn(2 * N, 5)
    y = torch.tanh(x @ direction) + 0.05 * torch.randn(2 * N, 1)
    w, b, losses = fit(x[:N], y[:N])
    held_out = (phi(x[N:]) @ w + b - y[N:]).pow(2).mean()
    prior_opt.zero_grad()
    held_out.backward()
    prior_opt.step()
    print(f"episode {episode}: first {losses[0]:.3f} fifth {losses[4]:.3f} last {losses[-1]:.3g} held-out {held_out.item():.3g}")
