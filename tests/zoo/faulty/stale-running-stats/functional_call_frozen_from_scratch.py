"""Second-order MAML with torch.func; BatchNorm kept in eval so that the forward is a pure function."""
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

torch.set_num_threads(1)
g = torch.Generator().manual_seed(3)
torch.manual_seed(3)

net = nn.Sequential(
    nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(),
    nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
    nn.Linear(32, 1),
)
net.eval()
params = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
buffers = dict(net.named_buffers())
opt = torch.optim.Adam(params.values(), lr=1e-3)


def predict(p, x):
    return functional_call(net, (p, buffers), (x,))


def make_task():
    # raw sensor readings: hectopascal, celsius, percent, ...
    scale = torch.tensor([20.0, 12.0, 30.0, 8.0, 40.0, 15.0])
    shift = torch.tensor([60.0, 18.0, 55.0, 3.0, 100.0, -20.0])
    w = torch.randn(6, 1, generator=g)
    z = torch.randn(40, 6, generator=g)
    y = torch.tanh(z @ w)
    x = z * scale + shift
    return x[:20], y[:20], x[20:], y[20:]


for step in range(6):
    meta_loss = 0.0
    for _ in range(2):
        xs, ys, xq, yq = make_task()
        fast = params
        for _ in range(3):
            loss = mse_loss(predict(fast, xs), ys)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {k: p - 0.05 * gr for (k, p), gr in zip(fast.items(), grads)}
            print(f"   inner loss {loss.item():.4g}")
        meta_loss = meta_loss + mse_loss(predict(fast, xq), yq)
    opt.zero_grad()
    meta_loss.backward()
    torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
    opt.step()
    print(f"outer {step}: query loss {meta_loss.item():.4g}")
