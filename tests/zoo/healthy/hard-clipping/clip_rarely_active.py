"""MAML with a safety clip on the meta-gradient that only acts on unusually hard tasks."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)
clipped = 0

for it in range(20):
    x = 6 * torch.rand(20, 1) - 3
    y = (0.5 + torch.rand(1)) * torch.sin(x + 3 * torch.rand(1))
    fast = dict(net.named_parameters())
    first = None
    for _ in range(5):
        loss = F.mse_loss(functional_call(net, fast, (x[:10],)), y[:10])
        first = first or loss.item()
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: w - 0.02 * g for (k, w), g in zip(fast.items(), grads)}
    query = F.mse_loss(functional_call(net, fast, (x[10:],)), y[10:])
    meta_opt.zero_grad()
    query.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.9)
    clipped += int(norm > 0.9)
    meta_opt.step()
    if it % 4 == 3:
        print(f"it {it}: {first:.3f} -> {loss.item():.3f} query {query.item():.3f} clipped {clipped}/{it + 1}")
