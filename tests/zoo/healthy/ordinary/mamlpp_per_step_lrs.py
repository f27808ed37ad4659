"""MAML++ style: a learned learning rate for every layer and step, multi-step query loss."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(10)
torch.set_num_threads(1)

STEPS = 4
net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
names = [k for k, _ in net.named_parameters()]
lrs = nn.Parameter(torch.full((STEPS, len(names)), 0.05))
opt = torch.optim.Adam([{"params": net.parameters()}, {"params": [lrs], "lr": 5e-4}], lr=2e-3)

for it in range(10):
    x = torch.randn(40, 2)
    y = torch.tanh(x @ torch.randn(2, 1))
    fast, support, meta_loss = dict(net.named_parameters()), [], 0.0
    for s in range(STEPS):
        loss = F.mse_loss(functional_call(net, fast, (x[:20],)), y[:20])
        support.append(loss.item())
        grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=True)
        fast = {n: fast[n] - lrs[s, i] * g for i, (n, g) in enumerate(zip(names, grads))}
        meta_loss = meta_loss + (s + 1) / 10 * F.mse_loss(functional_call(net, fast, (x[20:],)), y[20:])
    opt.zero_grad()
    meta_loss.backward()
    opt.step()
    print(f"it {it}: {support[0]:.3f} -> {support[-1]:.3f} query {meta_loss.item():.3f} lrs {lrs.min().item():.3f}..{lrs.max().item():.3f}")
