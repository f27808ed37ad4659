"""Hand-written inner loop over a parameter list that still holds the weights of a removed second layer."""
import torch
import torch.nn.functional as F

torch.manual_seed(1)
torch.set_num_threads(1)

DEPTH = 1


def make_params(width=16):
    params = [torch.randn(width, 2) / 2**0.5, torch.zeros(width)]
    params += [torch.randn(width, width) / width**0.5, torch.zeros(width)]
    params += [torch.randn(1, width) / width**0.5, torch.zeros(1)]
    return [p.requires_grad_() for p in params]


def model(x, params):
    h = torch.tanh(F.linear(x, params[0], params[1]))
    if DEPTH == 2:
        h = torch.tanh(F.linear(h, params[2], params[3]))
    return F.linear(h, params[4], params[5])


theta = make_params()
outer = torch.optim.SGD(theta, lr=1e-2)
for it in range(4):
    x = torch.randn(20, 2)
    y = (x[:, :1] * torch.randn(1)).sin()
    fast = theta
    for _ in range(3):
        loss = F.mse_loss(model(x[:10], fast), y[:10])
        print(f"it {it} support {loss.item():.4f}")
        fast = [p - 0.05 * g for p, g in zip(fast, torch.autograd.grad(loss, fast, create_graph=True))]
    outer.zero_grad()
    F.mse_loss(model(x[10:], fast), y[10:]).backward()
    outer.step()
