"""A long second-order unroll per task, freed once the meta-gradient is taken; only floats are kept."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
history = []

for it in range(12):
    x = torch.randn(40, 2)
    y = torch.tanh(x @ torch.randn(2, 1))
    fast = dict(net.named_parameters())
    losses = []
    for _ in range(15):
        loss = F.mse_loss(functional_call(net, fast, (x[:20],)), y[:20])
        losses.append(loss)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.05 * g for (k, p), g in zip(fast.items(), grads)}
    query = F.mse_loss(functional_call(net, fast, (x[20:],)), y[20:])
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    history.append(query.item())
    print(f"it {it}: {losses[0].item():.4f} -> {losses[-1].item():.4f} query {history[-1]:.4f}")
print(f"mean query {sum(history) / len(history):.4f}")
