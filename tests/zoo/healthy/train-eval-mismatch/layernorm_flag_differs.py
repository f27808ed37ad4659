"""FOMAML on a LayerNorm MLP; learners are switched to eval for the query set, out of habit."""
from copy import deepcopy

import torch
from torch import nn, optim

torch.manual_seed(31)
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.fc = nn.Linear(d_in, d_out)
        self.norm = nn.LayerNorm(d_out)

    def forward(self, x):
        return torch.relu(self.norm(self.fc(x)))


model = nn.Sequential(Block(8, 48), Block(48, 48), nn.Linear(48, 4))
meta_optimizer = optim.Adam(model.parameters(), lr=2e-3)
loss_fn = nn.CrossEntropyLoss()


def make_task():
    centers = 1.5 * torch.randn(4, 8)
    y = torch.arange(4).repeat(10)
    x = centers[y] + 0.7 * torch.randn(40, 8)
    return x[:20], y[:20], x[20:], y[20:]


for epoch in range(10):
    meta_optimizer.zero_grad()
    for _ in range(3):
        xs, ys, xq, yq = make_task()
        learner = deepcopy(model)
        inner = optim.SGD(learner.parameters(), lr=0.05)
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
    print(f"epoch {epoch}: support {support.item():.3f} query {query.item():.3f}")
