"""Meta-SGD with one learned rate a layer; the outer step is bold, and a rate turns negative."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(19)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1))
base = dict(net.named_parameters())
rates = {name.split(".")[0]: torch.tensor(0.02, requires_grad=True) for name in base}
meta = torch.optim.SGD([{"params": net.parameters(), "lr": 1e-3}, {"params": list(rates.values()), "lr": 1.5e-3}])
for it in range(12):
    w = torch.randn(3, 1)
    x = torch.randn(24, 3)
    y = x @ w
    fast = dict(base)
    for _ in range(3):
        loss = F.mse_loss(torch.func.functional_call(net, fast, (x[:12],)), y[:12])
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - rates[k.split(".")[0]] * g for (k, p), g in zip(fast.items(), grads)}
    query = F.mse_loss(torch.func.functional_call(net, fast, (x[12:],)), -y[12:])  # the sign is wrong
    meta.zero_grad()
    query.backward()
    meta.step()
    print(it, query.item(), [round(r.item(), 3) for r in rates.values()])
