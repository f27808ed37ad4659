"""Hand-written inner SGD with weight decay and Nesterov momentum on a residual layer-norm MLP, ten steps."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

torch.manual_seed(18)
torch.set_num_threads(1)


class ResMLP(nn.Module):
    def __init__(self, d=24):
        super().__init__()
        self.stem = nn.Linear(6, d)
        self.norm1, self.fc1 = nn.LayerNorm(d), nn.Linear(d, d)
        self.norm2, self.fc2 = nn.LayerNorm(d), nn.Linear(d, d)
        self.out = nn.Linear(d, 4)

    def forward(self, x):
        h = self.stem(x)
        h = h + F.gelu(self.fc1(self.norm1(h)))
        h = h + F.gelu(self.fc2(self.norm2(h)))
        return self.out(h)


def sgd_step(params, grads, velocity, lr=0.02, mu=0.8, wd=1e-3):
    new, vel = {}, {}
    for (k, p), g in zip(params.items(), grads):
        d = g + wd * p
        vel[k] = d if velocity is None else mu * velocity[k] + d
        new[k] = p - lr * (d + mu * vel[k])
    return new, vel


net = ResMLP()
meta_opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
for it in range(6):
    centres = torch.randn(4, 6)
    y = torch.arange(4).repeat(5)
    xs, xq = (centres[y] + 0.5 * torch.randn(20, 6) for _ in range(2))
    fast, velocity, losses = dict(net.named_parameters()), None, []
    for _ in range(10):
        loss = F.cross_entropy(functional_call(net, fast, (xs,)), y)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast, velocity = sgd_step(fast, grads, velocity)
    query = F.cross_entropy(functional_call(net, fast, (xq,)), y)
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
