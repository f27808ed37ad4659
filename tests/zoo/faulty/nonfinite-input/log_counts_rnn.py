"""Forecasting log counts with a GRU; each store is fine-tuned from a shared initialisation."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(3)
torch.set_num_threads(1)


class Forecaster(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.gru = nn.GRU(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        h, _ = self.gru(x)
        return self.out(h[:, -1])


def store(rate, n=24, length=8):
    counts = torch.poisson(torch.full((n, length + 1), rate))
    logs = counts.log()
    return logs[:, :length, None], logs[:, length:].clamp(min=0)


model = Forecaster()
for i, rate in enumerate([40.0, 60.0, 25.0, 3.0, 50.0]):
    x, y = store(rate)
    learner = copy.deepcopy(model)
    opt = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for epoch in range(6):
        opt.zero_grad()
        loss = nn.functional.mse_loss(learner(x), y)
        loss.backward()
        opt.step()
    print(f"store {i} (rate {rate}): loss {loss.item():.4f}")
    with torch.no_grad():
        for p, q in zip(model.parameters(), learner.parameters()):
            if torch.isfinite(q).all():
                p.lerp_(q, 0.3)
