"""First-order MAML on sinusoids: a deep copy is adapted with SGD for each task."""
import copy
import math

import torch
import torch.nn as nn

torch.manual_seed(0)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, x):
        return self.layers(x)


def sample(n):
    a, b = 0.5 + torch.rand(1), math.pi * torch.rand(1)
    x = 10 * torch.rand(n, 1) - 5
    return x, a * torch.sin(x + b)


model = Net()
meta_optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loss_fn = nn.MSELoss()

for it in range(8):
    meta_optimizer.zero_grad()
    x, y = sample(20)
    learner = copy.deepcopy(model)
    inner = torch.optim.SGD(learner.parameters(), lr=0.005)
    losses = []
    for _ in range(5):
        loss = loss_fn(learner(x[:10]), y[:10])
        loss.backward()
        inner.step()
        losses.append(loss.item())
    query = loss_fn(learner(x[10:]), y[10:])
    grads = torch.autograd.grad(query, tuple(learner.parameters()))
    for p, g in zip(model.parameters(), grads):
        p.grad = g
    meta_optimizer.step()
    print(f"it {it}: {losses[0]:.4f} -> {losses[-1]:.4f} query {query.item():.4f}")
