"""MAML on a GRU sequence regressor: dict of fast weights and torch.func.functional_call; meta-test at the end."""
import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(2)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 12, batch_first=True)
        self.fc = nn.Linear(12, 1)

    def forward(self, x):
        return self.fc(self.gru(x)[0])


def wave():
    f = 0.3 + 0.6 * torch.rand(1)
    t = torch.arange(11.0) + 8 * torch.rand(16, 1)
    s = torch.sin(f * t).unsqueeze(-1)
    return s[:8, :-1], s[:8, 1:], s[8:, :-1], s[8:, 1:]


net = Net()
mse = nn.MSELoss()
opt = torch.optim.Adam(net.parameters(), lr=3e-3)


def adapt(x, y, create_graph):
    fast, losses = dict(net.named_parameters()), []
    for _ in range(4):
        loss = mse(functional_call(net, fast, (x,)), y)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=create_graph)
        fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), grads)}
    return fast, losses


for it in range(10):
    xs, ys, xq, yq = wave()
    fast, losses = adapt(xs, ys, create_graph=True)
    query = mse(functional_call(net, fast, (xq,)), yq)
    opt.zero_grad()
    query.backward()
    opt.step()
    print(f"train {it}: {losses[0]:.4f} -> {losses[-1]:.4f} query {query.item():.4f}")
for n in range(3):
    xs, ys, xq, yq = wave()
    fast, losses = adapt(xs, ys, create_graph=False)
    with torch.no_grad():
        print(f"test {n}: {losses[0]:.4f} -> {losses[-1]:.4f} query {mse(functional_call(net, fast, (xq,)), yq).item():.4f}")
