"""Copies of a net are fine-tuned; a wrapper keeps its frozen encoder in eval, so container flags differ from the layers'."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(9)
torch.set_num_threads(1)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x):
        return self.head(self.encoder(x))


model = Wrapped()
opt = torch.optim.Adam(model.parameters(), lr=5e-3)
for it in range(8):
    opt.zero_grad()
    for _ in range(2):
        w = torch.randn(6, 1)
        x = torch.randn(40, 6)
        y = torch.tanh(x @ w)
        model.train()
        learner = copy.deepcopy(model)
        inner = torch.optim.SGD(learner.parameters(), lr=0.05)
        for _ in range(6):
            inner.zero_grad()
            loss = ((learner(x[:20]) - y[:20]) ** 2).mean()
            loss.backward()
            inner.step()
        model.eval()
        learner.zero_grad()
        query = ((learner(x[20:]) - y[20:]) ** 2).mean()
        query.backward()
        for p, q in zip(model.parameters(), learner.parameters()):
            p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad
    opt.step()
    print(f"{it}: support {loss.item():.3f} query {query.item():.3f}")
