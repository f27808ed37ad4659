"""Sets of points with zero padding go through a capsule-like squash; learners are copies."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(2)
torch.set_num_threads(1)


class Capsules(nn.Module):
    def __init__(self, n_class=3):
        super().__init__()
        self.primary = nn.Linear(4, 16, bias=False)
        self.classifier = nn.Linear(16, n_class)

    def squash(self, s):
        square = (s * s).sum(-1, keepdim=True)
        length = torch.where(square > 0, torch.sqrt(square), torch.zeros_like(square))
        return s * length / (1 + square)

    def forward(self, x):
        return self.classifier(self.squash(self.primary(x)).mean(1))


def point_sets(padded, n=24, size=6):
    centers = 2 * torch.randn(3, 1, 4)
    y = torch.randint(0, 3, (n,))
    x = centers[y] + torch.randn(n, size, 4)
    if padded:
        x[: n // 3, size - 2 :] = 0.0
    return x, y


criterion = nn.CrossEntropyLoss()
model = Capsules()
for task in range(5):
    x, y = point_sets(padded=task >= 2)
    learner = copy.deepcopy(model)
    opt = torch.optim.SGD(learner.parameters(), lr=0.3)
    for step in range(6):
        opt.zero_grad()
        loss = criterion(learner(x), y)
        loss.backward()
        opt.step()
        print(f"task {task} step {step} loss {loss.item():.4f}")
