"""Personalise copies of a pretrained model for each user; nobody ever calls eval()."""
import copy

import torch
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)


class UserModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, 32)
        self.bn = nn.BatchNorm1d(32)
        self.out = nn.Linear(32, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.bn(self.inp(x))))


w0 = torch.randn(5, 1)


def user(n=48):
    w = w0 + 0.5 * torch.randn(5, 1)
    x = torch.randn(n, 5)
    return x, torch.tanh(x @ w)


model = UserModel()
opt = torch.optim.Adam(model.parameters(), lr=1e-2)
for i in range(60):
    x, y = user()
    loss = nn.functional.mse_loss(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
print("pretrained", round(loss.item(), 4))

for u in range(6):
    x, y = user()
    learner = copy.deepcopy(model)
    sgd = torch.optim.SGD(learner.parameters(), lr=0.05)
    for step in range(8):
        sgd.zero_grad()
        loss = nn.functional.mse_loss(learner(x[:24]), y[:24])
        loss.backward()
        sgd.step()
    with torch.no_grad():
        query = nn.functional.mse_loss(learner(x[24:]), y[24:])
    print(f"user {u} support {loss.item():.4f} query {query.item():.4f}")
