"""Fine-tuning deep copies of a net whose forward was wrapped with torch.compile."""
import copy

import torch
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
net.forward = torch.compile(net.forward, backend="eager")
mse = nn.MSELoss()

for user in range(5):
    w = torch.randn(6, 1)
    x = torch.randn(40, 6)
    y = torch.tanh(x @ w)
    learner = copy.deepcopy(net)
    opt = torch.optim.SGD(learner.parameters(), lr=0.1)
    trace = []
    for step in range(6):
        opt.zero_grad()
        loss = mse(learner(x[:20]), y[:20])
        loss.backward()
        opt.step()
        trace.append(round(loss.item(), 4))
    with torch.no_grad():
        query = mse(learner(x[20:]), y[20:])
    print(f"user {user} {trace} query {query.item():.4f}")
