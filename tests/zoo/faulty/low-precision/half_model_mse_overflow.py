"""Adapt half-precision copies of a small regression net; targets are prices in raw units."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(0)
torch.set_num_threads(1)


class PriceNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 32)
        self.fc2 = nn.Linear(32, 1)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


model = PriceNet().half()
for city, level in enumerate([20.0, 60.0, 120.0, 420.0]):
    x = torch.randn(32, 6).half()
    y = (level + 0.1 * level * torch.randn(32, 1)).half()
    learner = copy.deepcopy(model)
    opt = torch.optim.SGD(learner.parameters(), lr=1e-3)
    for step in range(8):
        opt.zero_grad()
        loss = ((learner(x) - y) ** 2).mean()
        loss.backward()
        opt.step()
        print(f"city {city} step {step} loss {loss.item():.2f}")
