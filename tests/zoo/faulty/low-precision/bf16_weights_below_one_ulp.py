"""bfloat16 MAML evaluation with functional fast weights and a small learning rate."""
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

torch.manual_seed(1)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
with torch.no_grad():
    for p in net.parameters():
        p.add_(0.3 * torch.sign(p + 1e-9))  # as they come out of a long pretraining
net = net.to(torch.bfloat16)

for t in range(4):
    c = torch.randn(4, 8)
    y = torch.arange(4).repeat(8)
    x = (c[y] + 0.4 * torch.randn(32, 8)).to(torch.bfloat16)
    params = {k: p.detach().requires_grad_() for k, p in net.named_parameters()}
    for step in range(6):
        loss = cross_entropy(functional_call(net, params, (x[:16],)), y[:16])
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {k: (p - 1e-3 * g).detach().requires_grad_() for (k, p), g in zip(params.items(), grads)}
        norm = sum(g.float().norm() ** 2 for g in grads).sqrt()
        print(f"task {t} step {step} loss {loss.item():.4f} gradient {norm.item():.3f}")
    with torch.no_grad():
        acc = (functional_call(net, params, (x[16:],)).argmax(1) == y[16:]).float().mean()
    print(f"task {t} accuracy {acc.item():.2f}")
