"""Count regression on copies; the log is taken of a safe value where the rate is zero."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(2)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 1))
nn.init.constant_(model[2].bias, 1.0)


def poisson_nll(raw, count):
    rate = torch.relu(raw)
    positive = rate > 0
    safe = torch.where(positive, rate + 0.1, torch.ones_like(rate))
    log_rate = torch.where(positive, torch.log(safe), torch.zeros_like(rate))
    return (rate - count * log_rate).mean() + 0.1 * torch.relu(-raw).mean()


for task in range(5):
    w = torch.randn(4, 1)
    x = torch.randn(40, 4)
    y = torch.poisson(torch.exp(0.5 * x @ w).clamp(max=4))
    learner = copy.deepcopy(model)
    opt = torch.optim.SGD(learner.parameters(), lr=0.02)
    for step in range(12):
        opt.zero_grad()
        loss = poisson_nll(learner(x), y)
        loss.backward()
        opt.step()
        if step in (0, 11):
            print(f"task {task} step {step} loss {loss.item():.4f}")
    with torch.no_grad():
        for p, q in zip(model.parameters(), learner.parameters()):
            p.lerp_(q, 0.1)
