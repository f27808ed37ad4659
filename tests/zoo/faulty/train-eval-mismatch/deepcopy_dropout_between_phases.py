"""First-order MAML on copies of a dropout MLP: dropout is on while adapting and off when the query loss is taken."""
from copy import deepcopy

import torch
from torch import nn, optim

torch.manual_seed(31)
torch.set_num_threads(1)

model = nn.Sequential(
    nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.6),
    nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.6),
    nn.Linear(64, 4),
)
meta_optimizer = optim.Adam(model.parameters(), lr=2e-3)
loss_fn = nn.CrossEntropyLoss()


def make_task():
    centers = 1.5 * torch.randn(4, 8)
    y = torch.arange(4).repeat(10)
    x = centers[y] + 0.7 * torch.randn(40, 8)
    return x[:20], y[:20], x[20:], y[20:]


for epoch in range(12):
    meta_optimizer.zero_grad()
    for _ in range(3):
        xs, ys, xq, yq = make_task()
        learner = deepcopy(model)
        inner = optim.SGD(learner.parameters(), lr=0.1)
        learner.train()
        for _ in range(5):
            inner.zero_grad()
            support = loss_fn(learner(xs), ys)
            support.backward()
            inner.step()
        learner.eval()
        learner.zero_grad()
        query = loss_fn(learner(xq), yq)
        query.backward()
        for p, lp in zip(model.parameters(), learner.parameters()):
            p.grad = lp.grad / 3 if p.grad is None else p.grad + lp.grad / 3
    meta_optimizer.step()
    print(f"epoch {epoch}: support {support.item():.3f} (dropout), query {query.item():.3f}")
