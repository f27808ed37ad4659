"""Online adaptation with one sample per step: the BatchNorm layers of the pretrained net are frozen in eval."""
import copy

import torch
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
opt = torch.optim.Adam(model.parameters(), lr=1e-2)
mse = nn.MSELoss()
w0 = torch.randn(4, 1)


def stream(n):
    w = w0 + 0.5 * torch.randn(4, 1)
    x = torch.randn(n, 4)
    return x, torch.tanh(x @ w)


for i in range(100):
    x, y = stream(32)
    loss = mse(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
print("pretrained", loss.item())

for task in range(3):
    learner = copy.deepcopy(model).eval()
    sgd = torch.optim.SGD(learner.parameters(), lr=0.005)
    x, y = stream(40)
    before = mse(learner(x[20:]), y[20:]).item()
    for i in range(20):
        sgd.zero_grad()
        mse(learner(x[i : i + 1]), y[i : i + 1]).backward()
        sgd.step()
    print(f"task {task} query before {before:.3f} after {mse(learner(x[20:]), y[20:]).item():.3f}")
