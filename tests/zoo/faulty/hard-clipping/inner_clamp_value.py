"""MAML whose inner gradients are clamped element by element for stability."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)

CLIP = 1e-3
net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

for it in range(8):
    meta_opt.zero_grad()
    x = 10 * torch.rand(20, 1) - 5
    y = (1 + 4 * torch.rand(1)) * torch.sin(x + 3 * torch.rand(1))
    fast = dict(net.named_parameters())
    losses = []
    for _ in range(5):
        loss = F.mse_loss(functional_call(net, fast, (x[:10],)), y[:10])
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: w - 1.0 * g.clamp(-CLIP, CLIP) for (k, w), g in zip(fast.items(), grads)}
    query = F.mse_loss(functional_call(net, fast, (x[10:],)), y[10:])
    query.backward()
    meta_opt.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
