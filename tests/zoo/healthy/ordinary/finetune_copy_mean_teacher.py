"""Ordinary training: a teacher is fine-tuned with a new head, a student follows with a mean teacher. No loop is nested."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

x = torch.randn(120, 10)
y = (x @ torch.randn(10, 3)).argmax(1)


def fit(model, parameters, labels, steps, after=lambda: None):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        after()
    print(round(loss.item(), 3))
    return optimizer


teacher = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
first = fit(teacher, list(teacher.parameters()), y, 30)
tuned = copy.deepcopy(teacher)
tuned[3] = nn.Linear(32, 2)
second = fit(tuned, list(tuned[3].parameters()), y % 2, 20)
student = copy.deepcopy(teacher)
average = copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow():
    for mean, p in zip(average.parameters(), student.parameters()):
        mean.mul_(0.95).add_(p, alpha=0.05)


third = fit(student, list(student.parameters()), y, 25, follow)
