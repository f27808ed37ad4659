"""Binary tasks with torch.func: sharpened sigmoid output and a BCE written out."""
import torch
from torch import nn
from torch.func import functional_call, grad

torch.manual_seed(3)
torch.set_num_threads(1)


class SharpGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 32)
        self.gate = nn.Linear(32, 1)

    def forward(self, x, sharpness):
        return torch.sigmoid(sharpness * self.gate(torch.tanh(self.hidden(x)))).squeeze(1)


net = SharpGate()
params = {k: v.detach() for k, v in net.named_parameters()}


def bce(p, x, y, sharpness):
    prob = functional_call(net, p, (x, sharpness))
    return -(y * prob.log() + (1 - y) * (1 - prob).log()).mean()


for t, sharpness in enumerate([1.0, 2.0, 4.0, 60.0, 60.0]):
    w = torch.randn(4)
    x = torch.randn(40, 4)
    y = (x @ w > 0).float()
    p = params
    losses = []
    for _ in range(5):
        losses.append(bce(p, x[:20], y[:20], sharpness).item())
        g = grad(bce)(p, x[:20], y[:20], sharpness)
        p = {k: p[k] - 0.2 / sharpness**2 * g[k] for k in p}
    query = bce(p, x[20:], y[20:], sharpness)
    print(f"task {t} sharpness {sharpness}: {[round(v, 3) for v in losses]} query {query.item():.4f}")
