"""Test-time fine-tuning of one net in place, user by user; its body runs under checkpoint_sequential."""
import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

torch.set_num_threads(1)
torch.manual_seed(5)
body = nn.Sequential(
    nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(),
    nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
)
head = nn.Linear(32, 1)
net = nn.ModuleDict({"body": body, "head": head})


def predict(x):
    return net["head"](checkpoint_sequential(net["body"], 3, x, use_reentrant=False))


mse = nn.MSELoss()
base = copy.deepcopy(net.state_dict())
for user in range(5):
    net.load_state_dict(base)
    w = torch.randn(6, 1)
    x = torch.randn(32, 6)
    y = torch.tanh(x @ w)
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for step in range(8):
        opt.zero_grad()
        loss = mse(predict(x), y)
        loss.backward()
        opt.step()
        losses.append(round(loss.item(), 3))
    print(user, losses, "tracked", int(net["body"][1].num_batches_tracked))
net.load_state_dict(base)
