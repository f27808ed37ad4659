"""Regression from two support points per task; functional MLP with BatchNorm layers, second-order MAML."""
import torch
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)
torch.manual_seed(12)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Linear(3, 40)
        self.bn1 = nn.BatchNorm1d(40)
        self.l2 = nn.Linear(40, 40)
        self.bn2 = nn.BatchNorm1d(40)
        self.l3 = nn.Linear(40, 1)

    def forward(self, x):
        x = torch.relu(self.bn1(self.l1(x)))
        x = torch.relu(self.bn2(self.l2(x)))
        return self.l3(x)


net = MLP()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for it in range(12):
    optimizer.zero_grad()
    total = 0.0
    for _ in range(3):
        amplitude = torch.rand(1) * 2 + 0.5
        xs, xq = torch.randn(2, 3), torch.randn(20, 3)
        ys, yq = (amplitude * x.sum(1, keepdim=True).sin() for x in (xs, xq))
        params = dict(net.named_parameters())
        buffers = {k: b.clone() for k, b in net.named_buffers()}
        for _ in range(3):
            support = (functional_call(net, (params, buffers), (xs,)) - ys).pow(2).mean()
            grads = torch.autograd.grad(support, params.values(), create_graph=True)
            params = {k: p - 0.01 * g for (k, p), g in zip(params.items(), grads)}
        query = (functional_call(net, (params, buffers), (xq,)) - yq).pow(2).mean() / 3
        query.backward()
        total += query.item()
    optimizer.step()
    print(f"{it:2d} support {support.item():.4f} query {total:.4f}")
