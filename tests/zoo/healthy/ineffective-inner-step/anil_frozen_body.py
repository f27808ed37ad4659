"""ANIL: the convolutional body stays as it is in the inner loop, only the linear head adapts."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

body = nn.Sequential(
    nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
    nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(),
)
head = nn.Linear(8 * 9, 5)
opt = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)


def episode(ways=5, shots=3):
    protos = torch.randn(ways, 1, 12, 12)
    y = torch.arange(ways).repeat(shots)
    return protos[y] + 0.5 * torch.randn(len(y), 1, 12, 12), y, protos[y] + 0.5 * torch.randn(len(y), 1, 12, 12), y


for it in range(10):
    opt.zero_grad()
    total, gain = 0.0, 0.0
    for _ in range(2):
        xs, ys, xq, yq = episode()
        features = body(xs)
        w, b = head.weight, head.bias
        start = None
        for _ in range(5):
            loss = F.cross_entropy(F.linear(features, w, b), ys)
            start = start or loss.item()
            gw, gb = torch.autograd.grad(loss, (w, b), create_graph=True)
            w, b = w - 0.05 * gw, b - 0.05 * gb
        query = F.cross_entropy(F.linear(body(xq), w, b), yq) / 2
        query.backward()
        total += query.item()
        gain += (start - loss.item()) / 2
    opt.step()
    print(f"it {it}: query {total:.4f} support gain {gain:.4f}")
