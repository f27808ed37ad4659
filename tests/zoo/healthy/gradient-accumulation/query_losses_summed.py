"""MAML with a meta-batch of four tasks whose query losses are backpropagated one by one before one outer step."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)
META_BATCH = 4

for it in range(8):
    meta_opt.zero_grad()
    total, gain = 0.0, 0.0
    for _ in range(META_BATCH):
        w = torch.randn(3, 1)
        x = torch.randn(20, 3)
        y = torch.tanh(x @ w)
        fast = dict(net.named_parameters())
        losses = []
        for _ in range(3):
            loss = F.mse_loss(functional_call(net, fast, (x[:10],)), y[:10])
            losses.append(loss.item())
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {k: v - 0.05 * g for (k, v), g in zip(fast.items(), grads)}
        query = F.mse_loss(functional_call(net, fast, (x[10:],)), y[10:]) / META_BATCH
        query.backward()
        total += query.item()
        gain += (losses[0] - losses[-1]) / META_BATCH
    meta_opt.step()
    print(f"it {it}: query {total:.4f} support gain {gain:.4f}")
