"""Adapts a well pre-trained regressor to tasks it already solves, then checks that adaptation does no harm."""
import copy

import torch
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

truth = torch.randn(4, 1)
model = nn.Linear(4, 1)
fit = torch.optim.SGD(model.parameters(), lr=0.3)
for _ in range(400):
    x = torch.randn(64, 4)
    fit.zero_grad()
    nn.functional.mse_loss(model(x), x @ truth).backward()
    fit.step()
print("pre-trained")

for task in range(6):
    x = torch.randn(30, 4) + 0.2 * task
    y = x @ truth + 0.01 * torch.randn(30, 1)
    learner = copy.deepcopy(model)
    sgd = torch.optim.SGD(learner.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        sgd.zero_grad()
        loss = nn.functional.mse_loss(learner(x[:20]), y[:20])
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    with torch.no_grad():
        test = nn.functional.mse_loss(learner(x[20:]), y[20:]).item()
    print(f"task {task}: support {losses[0]:.2e} -> {losses[-1]:.2e}, test {test:.2e}")
