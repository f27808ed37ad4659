"""MAML runs through; the summary at the end multiplies two matrices whose shapes do not fit."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(1)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(5, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 3))
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)
table = []
for it in range(8):
    centres = torch.randn(3, 5)
    y = torch.arange(3).repeat(5)
    xs, xq = (centres[y] + 0.5 * torch.randn(15, 5) for _ in range(2))
    fast = dict(net.named_parameters())
    row = []
    for _ in range(4):
        loss = F.cross_entropy(functional_call(net, fast, (xs,)), y)
        row.append(loss.item())
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), grads)}
    query = F.cross_entropy(functional_call(net, fast, (xq,)), y)
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    table.append(row)
    print(f"it {it}: {row[0]:.3f} -> {row[-1]:.3f} query {query.item():.3f}")

weights = torch.full((8,), 1 / 8)
print("mean curve", torch.tensor(table) @ weights)
