"""First-order MAML without copies: adapt the model, put it back, step with the query's gradient."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
inner = torch.optim.SGD(net.parameters(), lr=0.01)
outer = torch.optim.Adam(net.parameters(), lr=1e-3)


def batch(amplitude, phase):
    x = torch.rand(20, 1) * 10 - 5
    return x, amplitude * torch.sin(x + phase)


for it in range(25):
    task = 0.5 + torch.rand(1), 3 * torch.rand(1)
    before = copy.deepcopy(net.state_dict())
    for _ in range(4):
        x, y = batch(*task)
        inner.zero_grad()
        F.mse_loss(net(x), y).backward()
        inner.step()
    x, y = batch(*task)
    outer.zero_grad()
    query = F.mse_loss(net(x), y)
    query.backward()
    net.load_state_dict(before)
    outer.step()
    print(it, round(query.item(), 4))
