"""FOMAML with an inner learning rate that is annealed after every task; GRU sequence classifier on deep copies."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(2)
torch.set_num_threads(1)


class SeqNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 16, batch_first=True)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        _, h = self.rnn(x)
        return self.fc(h[-1])


def make_task():
    w = torch.randn(3)
    x = torch.randn(24, 8, 3)
    y = ((x @ w).cumsum(1)[:, -1] > 0).long()
    return (x[:12], y[:12]), (x[12:], y[12:])


model = SeqNet()
outer = torch.optim.Adam(model.parameters(), lr=2e-3)
ce = nn.CrossEntropyLoss()
inner_lr, decay = 1e-4, 0.2

for t in range(12):
    (xs, ys), (xq, yq) = make_task()
    learner = copy.deepcopy(model)
    sgd = torch.optim.SGD(learner.parameters(), lr=inner_lr)
    first = None
    for _ in range(4):
        sgd.zero_grad()
        loss = ce(learner(xs), ys)
        loss.backward()
        sgd.step()
        first = first or loss.item()
    learner.zero_grad()
    query = ce(learner(xq), yq)
    query.backward()
    outer.zero_grad()
    for p, q in zip(model.parameters(), learner.parameters()):
        p.grad = q.grad
    outer.step()
    inner_lr *= decay
    print(f"task {t}: lr {inner_lr:.1e} support {first:.5f} -> {loss.item():.5f} query {query.item():.4f}")
