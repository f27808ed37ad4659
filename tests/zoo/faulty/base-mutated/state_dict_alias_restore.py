"""Adapts a model to each domain in turn and restores the source weights before the next one."""
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(6, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(F.relu(self.features(x)))


model = Net()
source = torch.randn(3, 6)


def domain(shift):
    y = torch.arange(3).repeat(14)
    x = source[y] @ torch.linalg.matrix_exp(shift * (skew - skew.T)) + 0.5 * torch.randn(42, 6)
    return x[:21], y[:21], x[21:], y[21:]


skew = torch.randn(6, 6)
fit = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(60):
    x, y, _, _ = domain(0.0)
    fit.zero_grad()
    F.cross_entropy(model(x), y).backward()
    fit.step()

source_weights = model.state_dict()
for k in range(8):
    model.load_state_dict(source_weights)
    xs, ys, xq, yq = domain(0.2 * k)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(xs), ys)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(xq).argmax(1) == yq).float().mean().item()
    print(f"domain {k}: support {losses[0]:.3f} -> {losses[-1]:.3f} accuracy {accuracy:.2f}")
