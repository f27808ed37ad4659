"""higher.monkeypatch with a differentiable Adam made fresh per task; GroupNorm conv net."""
import torch
import torch.nn.functional as F
from higher import monkeypatch
from higher.optim import DifferentiableAdam
from torch import nn, optim

torch.manual_seed(16)
torch.set_num_threads(1)

net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 3)
)
meta = optim.SGD(net.parameters(), lr=0.02)
for it in range(8):
    protos = torch.randn(3, 1, 8, 8)
    y = torch.arange(3).repeat(4)
    xs, xq = (protos[y] + 0.5 * torch.randn(12, 1, 8, 8) for _ in range(2))
    fast = monkeypatch(net, copy_initial_weights=False)
    inner = DifferentiableAdam(optim.Adam(net.parameters(), lr=3e-3, eps=1e-3), list(net.parameters()), fmodel=fast)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(fast(xs), y)
        losses.append(loss.item())
        inner.step(loss)
    query = F.cross_entropy(fast(xq), y)
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
