"""First-order MAML: `FIRST_ORDER = True`, gradients of the inner loop are constants of the outer problem."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)

FIRST_ORDER = True
net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)

for it in range(10):
    w = torch.randn(3, 1)
    x = torch.randn(30, 3)
    y = torch.sin(x @ w)
    fast = dict(net.named_parameters())
    losses = []
    for _ in range(5):
        loss = F.mse_loss(functional_call(net, fast, (x[:15],)), y[:15])
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not FIRST_ORDER)
        fast = {k: p - 0.05 * g for (k, p), g in zip(fast.items(), grads)}
    query = F.mse_loss(functional_call(net, fast, (x[15:],)), y[15:])
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
