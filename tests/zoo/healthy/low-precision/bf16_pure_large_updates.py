"""Pure bfloat16 learners whose updates are far above one ulp."""
from copy import deepcopy

import torch
from torch import nn

torch.manual_seed(4)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3)).to(torch.bfloat16)
criterion = nn.CrossEntropyLoss()

for task in range(4):
    c = torch.randn(3, 12)
    y = torch.arange(3).repeat(10)
    x = (c[y] + 0.3 * torch.randn(30, 12)).to(torch.bfloat16)
    learner = deepcopy(model)
    opt = torch.optim.SGD(learner.parameters(), lr=0.3)
    trace = []
    for step in range(8):
        opt.zero_grad()
        loss = criterion(learner(x), y)
        loss.backward()
        opt.step()
        trace.append(round(loss.item(), 3))
    print(f"task {task} {trace}")
