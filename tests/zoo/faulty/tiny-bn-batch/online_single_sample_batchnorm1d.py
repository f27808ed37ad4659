"""Online adaptation: the learner takes one gradient step for each incoming sample."""
import copy

import torch
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
opt = torch.optim.Adam(model.parameters(), lr=1e-2)


def stream(n):
    w = torch.randn(4, 1)
    x = torch.randn(n, 4)
    return x, torch.tanh(x @ w)


print("pretraining")
for i in range(30):
    x, y = stream(32)
    loss = nn.functional.mse_loss(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()

for task in range(3):
    learner = copy.deepcopy(model)
    learner.train()
    sgd = torch.optim.SGD(learner.parameters(), lr=0.01)
    x, y = stream(10)
    for i in range(10):
        sgd.zero_grad()
        loss = nn.functional.mse_loss(learner(x[i : i + 1]), y[i : i + 1])
        loss.backward()
        sgd.step()
    print(f"task {task} last loss {loss.item():.3f}")
