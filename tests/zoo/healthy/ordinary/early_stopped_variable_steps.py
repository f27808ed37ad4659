"""MAML where the number of inner steps varies: each task stops once its support loss is low enough."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(15)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
opt = torch.optim.Adam(net.parameters(), lr=2e-3)
for it in range(8):
    opt.zero_grad()
    report = []
    for _ in range(torch.randint(1, 4, (1,)).item()):
        x = torch.randn(30, 3)
        y = torch.tanh(x @ torch.randn(3, 1))
        fast, losses = dict(net.named_parameters()), []
        for _ in range(20):
            loss = F.mse_loss(functional_call(net, fast, (x[:15],)), y[:15])
            losses.append(loss.item())
            if loss.item() < 0.15:
                break
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {k: p - 0.05 * g for (k, p), g in zip(fast.items(), grads)}
        query = F.mse_loss(functional_call(net, fast, (x[15:],)), y[15:])
        query.backward()
        report.append(f"{losses[0]:.3f}->{losses[-1]:.3f} in {len(losses) - 1}")
    opt.step()
    print(f"it {it}:", "; ".join(report))
