"""Personalisation of float32 weights under a bfloat16 autocast, with plain SGD at a usual rate."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(3)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 3))
for user in range(5):
    x = torch.randn(32, 10)
    y = (x[:, :3].float() + 0.1).argmax(1)
    learner = copy.deepcopy(net)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.02)
    for _ in range(15):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = F.cross_entropy(learner(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(user, loss.item())
