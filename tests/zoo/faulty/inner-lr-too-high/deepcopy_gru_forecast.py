"""First-order meta-learning of a GRU forecaster: each series is adapted on a deep copy with torch.optim.SGD."""
import copy

import torch
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)


class Forecaster(nn.Module):
    def __init__(self, hidden=24):
        super().__init__()
        self.gru = nn.GRU(1, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, x):
        h, _ = self.gru(x)
        return self.readout(h)


def make_series(n=8, length=12):
    freq = 0.2 + 0.6 * torch.rand(1)
    start = 6.28 * torch.rand(n, 1)
    t = torch.arange(length + 1.0)
    wave = (1.0 + 2.0 * torch.rand(1)) * torch.sin(freq * t + start).unsqueeze(-1)
    return wave[:, :-1], wave[:, 1:]


model = Forecaster()
meta_optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
criterion = nn.MSELoss()

for it in range(5):
    x, y = make_series()
    x_new, y_new = make_series()

    learner = copy.deepcopy(model)
    optimizer = torch.optim.SGD(learner.parameters(), lr=2.0, momentum=0.5)
    history = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = criterion(learner(x), y)
        loss.backward()
        optimizer.step()
        history.append(round(loss.item(), 3))

    learner.zero_grad()
    val_loss = criterion(learner(x_new), y_new)
    val_loss.backward()
    meta_optimizer.zero_grad()
    for p, q in zip(model.parameters(), learner.parameters()):
        p.grad = q.grad.clone()
    meta_optimizer.step()
    print("iter", it, "support", history[:3], "...", history[-1], "query", val_loss.item())
