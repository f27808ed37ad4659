"""Sequence classification with a GRU and a hand-written MAML loop; `training` is passed along by hand."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(17)
torch.set_num_threads(1)


class GRUClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 24)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        h = x.new_zeros(x.size(0), 24)
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
        return self.out(self.drop(h))


def sequences():
    freq = 0.4 + 1.6 * torch.rand(3, 1, 4)
    phase = 3 * torch.rand(3, 1, 4)
    y = torch.arange(3).repeat(8)
    t = torch.arange(8.0).view(1, 8, 1)
    x = torch.sin(freq[y] * t + phase[y]) + 0.1 * torch.randn(24, 8, 4)
    return x[:12], y[:12], x[12:], y[12:]


model = GRUClassifier()
outer = torch.optim.Adam(model.parameters(), lr=5e-3)
for it in range(10):
    xs, ys, xq, yq = sequences()
    names = [n for n, _ in model.named_parameters()]
    weights = list(model.parameters())
    model.train()
    for k in range(4):
        logits = torch.func.functional_call(model, dict(zip(names, weights)), (xs,))
        inner_loss = F.cross_entropy(logits, ys)
        grads = torch.autograd.grad(inner_loss, weights, create_graph=True)
        weights = [w - 0.3 * g for w, g in zip(weights, grads)]
    model.eval()
    logits = torch.func.functional_call(model, dict(zip(names, weights)), (xq,))
    outer_loss = F.cross_entropy(logits, yq)
    outer.zero_grad()
    outer_loss.backward()
    outer.step()
    print(f"[{it}] inner {inner_loss.item():.3f} outer {outer_loss.item():.3f}")
