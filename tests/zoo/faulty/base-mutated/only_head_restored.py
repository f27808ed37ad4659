"""Per-user adaptation of a GRU; after each user the head is put back to its pre-trained state."""
import copy

import torch
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)


class Tracker(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.gru(x)[0])


def user():
    f = 0.2 + 0.8 * torch.rand(1)
    t = torch.arange(16.0) + 12 * torch.rand(10, 1)
    s = torch.sin(f * t).unsqueeze(-1)
    return s[:, :-1], s[:, 1:]


model = Tracker()
mse = nn.MSELoss()
pre = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(25):
    x, y = user()
    pre.zero_grad()
    mse(model(x), y).backward()
    pre.step()

head_state = copy.deepcopy(model.head.state_dict())
for u in range(7):
    x, y = user()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = mse(model(x[:5]), y[:5])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        test = mse(model(x[5:]), y[5:]).item()
    model.head.load_state_dict(head_state)
    print(f"user {u}: {losses[0]:.4f} -> {losses[-1]:.4f} test {test:.4f}")
