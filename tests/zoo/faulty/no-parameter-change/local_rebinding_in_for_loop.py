"""MAML on linear systems with a list of fast weights, five inner steps per task."""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

INNER_LR = 0.05


def init(sizes=(3, 32, 1)):
    out = []
    for a, b in zip(sizes, sizes[1:]):
        out.append((torch.randn(b, a) / a**0.5).requires_grad_())
        out.append(torch.zeros(b, requires_grad=True))
    return out


def net(x, w):
    return F.linear(torch.tanh(F.linear(x, w[0], w[1])), w[2], w[3])


weights = init()
meta_opt = torch.optim.Adam(weights, lr=1e-3)

for it in range(8):
    w_true = torch.randn(3, 1)
    x = torch.randn(30, 3)
    y = torch.tanh(x @ w_true)
    fast = list(weights)
    losses = []
    for _ in range(5):
        loss = F.mse_loss(net(x[:15], fast), y[:15])
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        for w, g in zip(fast, grads):
            w = w - INNER_LR * g
        losses.append(loss.item())
    query = F.mse_loss(net(x[15:], fast), y[15:])
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"it {it}: support {losses[0]:.4f} -> {losses[-1]:.4f} query {query.item():.4f}")
