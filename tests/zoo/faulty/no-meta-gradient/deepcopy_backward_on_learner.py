"""First-order MAML for a GRU with deep copies; validation loss is backpropagated before the meta step."""
import copy

import torch
from torch import nn

torch.manual_seed(3)
torch.set_num_threads(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 16, batch_first=True)
        self.fc = nn.Linear(16, 1)

    def forward(self, x):
        return self.fc(self.gru(x)[0][:, -1])


model = Model()
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)
criterion = nn.MSELoss()

for it in range(6):
    w = torch.randn(2, 1)
    x = torch.randn(24, 6, 2)
    y = (x @ w).mean(1)
    learner = copy.deepcopy(model)
    inner_opt = torch.optim.SGD(learner.parameters(), lr=0.05)
    start = None
    for _ in range(5):
        inner_opt.zero_grad()
        loss = criterion(learner(x[:12]), y[:12])
        loss.backward()
        inner_opt.step()
        start = start or loss.item()
    meta_opt.zero_grad()
    learner.zero_grad()
    val = criterion(learner(x[12:]), y[12:])
    val.backward()
    meta_opt.step()
    print(f"it {it}: train {start:.4f} -> {loss.item():.4f} val {val.item():.4f}")
