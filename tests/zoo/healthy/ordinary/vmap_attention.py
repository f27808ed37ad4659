"""A batch of tasks under vmap: a small attention net adapted with torch.func.grad."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

torch.manual_seed(10)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        h = self.embed(x)
        weights = torch.softmax(self.query(h) @ self.key(h).transpose(-1, -2) / 4, -1)
        return self.out(h + weights @ self.value(h))


net = Net()
base = dict(net.named_parameters())
meta = torch.optim.Adam(net.parameters(), lr=1e-3)


def loss_of(parameters, x, y):
    return F.mse_loss(functional_call(net, parameters, (x,)), y)


def task_loss(x, y, xq, yq):
    fast = base
    for _ in range(5):
        grads, _ = grad_and_value(loss_of)(fast, x, y)
        fast = {name: p - 0.05 * grads[name] for name, p in fast.items()}
    return loss_of(fast, xq, yq)


for it in range(6):
    x = torch.randn(4, 16, 3)
    y = 2 * x[..., :1] - x[..., 1:2]
    loss = vmap(task_loss)(x[:, :8], y[:, :8], x[:, 8:], y[:, 8:]).mean()
    meta.zero_grad()
    loss.backward()
    meta.step()
    print(it, loss.item())
