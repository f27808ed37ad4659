"""MAML with a running history of query losses, plotted as a mean at the end."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
history = []

for it in range(40):
    x = 6 * torch.rand(40, 1) - 3
    y = (1 + torch.rand(1)) * torch.sin(x + 3 * torch.rand(1))
    fast = dict(net.named_parameters())
    for _ in range(4):
        loss = F.mse_loss(functional_call(net, fast, (x[:20],)), y[:20])
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.02 * g for (k, p), g in zip(fast.items(), grads)}
    query = F.mse_loss(functional_call(net, fast, (x[20:],)), y[20:])
    meta_opt.zero_grad()
    query.backward(retain_graph=True)
    meta_opt.step()
    history.append(query)
    if it % 8 == 7:
        print(f"it {it}: query {query.item():.4f} mean so far {sum(history).item() / len(history):.4f}")
