"""Evaluation of an initialisation: one plain SGD object is used for every task, weights reloaded in between."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(1)
torch.set_num_threads(1)

model = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(8 * 16, 4))
initial = copy.deepcopy(model.state_dict())
sgd = torch.optim.SGD(model.parameters(), lr=0.03)
criterion = nn.CrossEntropyLoss()

for task in range(8):
    model.load_state_dict(initial)
    shapes = torch.randn(4, 1, 16)
    y = torch.arange(4).repeat(6)
    x = shapes[y] + 0.4 * torch.randn(24, 1, 16)
    curve = []
    for _ in range(8):
        sgd.zero_grad()
        loss = criterion(model(x[:12]), y[:12])
        loss.backward()
        sgd.step()
        curve.append(loss.item())
    with torch.no_grad():
        accuracy = (model(x[12:]).argmax(1) == y[12:]).float().mean().item()
    print(f"task {task}: {curve[0]:.3f} -> {curve[-1]:.3f} accuracy {accuracy:.2f}")
