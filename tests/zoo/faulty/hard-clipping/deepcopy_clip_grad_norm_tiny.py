"""FOMAML with clip_grad_norm_ before every inner SGD step."""
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

torch.manual_seed(2)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.gru(x)[0])


base = Net()
outer = torch.optim.Adam(base.parameters(), lr=1e-3)
for it in range(8):
    f = 0.3 + 0.5 * torch.rand(1)
    t = torch.arange(13.0) + 10 * torch.rand(16, 1)
    s = (2 * torch.sin(f * t)).unsqueeze(-1)
    x, y = s[:, :-1], s[:, 1:]
    learner = copy.deepcopy(base)
    sgd = torch.optim.SGD(learner.parameters(), lr=1.0)
    losses = []
    for _ in range(6):
        sgd.zero_grad()
        loss = F.mse_loss(learner(x[:8]), y[:8])
        loss.backward()
        clip_grad_norm_(learner.parameters(), max_norm=0.02)
        sgd.step()
        losses.append(loss.item())
    learner.zero_grad()
    query = F.mse_loss(learner(x[8:]), y[8:])
    query.backward()
    for p, q in zip(base.parameters(), learner.parameters()):
        p.grad = q.grad
    outer.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
