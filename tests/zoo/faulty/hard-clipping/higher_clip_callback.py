"""higher with a grad_callback that clips each gradient's norm before the differentiable step."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

MAX_NORM = 0.01
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)
)
outer = torch.optim.Adam(net.parameters(), lr=2e-3)


def clip(all_grads):
    total = torch.sqrt(sum(g.pow(2).sum() for g in all_grads) + 1e-12)
    scale = (MAX_NORM / total).clamp(max=1.0)
    return [g * scale for g in all_grads]


for it in range(8):
    protos = torch.randn(4, 1, 8, 8)
    y = torch.arange(4).repeat(4)
    xs, xq = (protos[y] + 0.4 * torch.randn(16, 1, 8, 8) for _ in range(2))
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, opt):
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(fnet(xs), y)
            losses.append(loss.item())
            opt.step(loss, grad_callback=clip)
        query = F.cross_entropy(fnet(xq), y)
    outer.zero_grad()
    query.backward()
    outer.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
