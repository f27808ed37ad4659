"""Half precision with a loss scale of its own that nobody lowers: the gradient overflows."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
LOSS_SCALE = 2.0**24

model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).half()
for task in range(6):
    learner = copy.deepcopy(model)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-2)
    x, y = torch.randn(64, 16).half(), torch.randint(0, 4, (64,))
    for _ in range(3):
        loss = F.cross_entropy(learner(x).float(), y)
        optimizer.zero_grad()
        (loss * LOSS_SCALE).backward()
        for parameter in learner.parameters():
            parameter.grad.div_(LOSS_SCALE)
        optimizer.step()
    print(task, loss.item())
