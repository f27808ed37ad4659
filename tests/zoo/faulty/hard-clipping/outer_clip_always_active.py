"""Second-order MAML with the meta-gradient clipped to a small norm before SGD."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(3)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 3))
meta_opt = torch.optim.SGD(net.parameters(), lr=0.1)
for it in range(15):
    meta_opt.zero_grad()
    centres = torch.randn(3, 6)
    y = torch.arange(3).repeat(6)
    xs, xq = (centres[y] + 0.5 * torch.randn(18, 6) for _ in range(2))
    fast = dict(net.named_parameters())
    for _ in range(3):
        loss = F.cross_entropy(functional_call(net, fast, (xs,)), y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), grads)}
    query = F.cross_entropy(functional_call(net, fast, (xq,)), y)
    query.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    meta_opt.step()
    if it % 3 == 0:
        print(f"it {it}: support {loss.item():.3f} query {query.item():.3f} meta-gradient before clipping {norm.item():.3f}")
