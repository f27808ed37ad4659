"""Fine-tuning half-precision copies of a text-free toy encoder with Adam."""
from copy import deepcopy

import torch
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3)).half()
criterion = nn.CrossEntropyLoss()


def batch():
    c = torch.randn(3, 12)
    y = torch.arange(3).repeat(10)
    x = c[y] + 0.3 * torch.randn(30, 12)
    x[:, 9:] = 0.0
    return x.half(), y


for task in range(4):
    x, y = batch()
    learner = deepcopy(model)
    opt = torch.optim.Adam(learner.parameters(), lr=1e-3)
    for step in range(5):
        opt.zero_grad(set_to_none=True)
        loss = criterion(learner(x), y)
        loss.backward()
        opt.step()
        print(f"task {task} step {step} loss {loss.item():.4f}")
