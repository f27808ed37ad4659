"""ANIL-like adaptation on deep copies: features are computed once per task and reused in every inner step."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 24), nn.ReLU())
        self.head = nn.Linear(24, 3)


model = Net()
outer = torch.optim.Adam(model.parameters(), lr=1e-3)
for it in range(5):
    centres = torch.randn(3, 6)
    y = torch.arange(3).repeat(5)
    xs, xq = (centres[y] + 0.5 * torch.randn(15, 6) for _ in range(2))
    learner = copy.deepcopy(model)
    sgd = torch.optim.SGD(learner.head.parameters(), lr=0.1)
    features = learner.encoder(xs)
    for step in range(4):
        sgd.zero_grad()
        loss = F.cross_entropy(learner.head(features), y)
        loss.backward()
        sgd.step()
        print(f"it {it} step {step} support {loss.item():.4f}")
    query = F.cross_entropy(learner.head(learner.encoder(xq)), y)
    learner.zero_grad()
    query.backward()
    for p, q in zip(model.parameters(), learner.parameters()):
        p.grad = q.grad
    outer.step()
