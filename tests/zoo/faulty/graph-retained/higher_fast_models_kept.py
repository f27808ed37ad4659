"""Meta-trains with higher and keeps each task's adapted weights for a later comparison."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(8, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
outer = torch.optim.Adam(net.parameters(), lr=1e-3)
adapted = {}

for task in range(30):
    centres = torch.randn(4, 8)
    y = torch.arange(4).repeat(6)
    xs, xq = (centres[y] + 0.6 * torch.randn(24, 8) for _ in range(2))
    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, opt):
        for _ in range(4):
            opt.step(F.cross_entropy(fnet(xs), y))
        query = F.cross_entropy(fnet(xq), y)
    outer.zero_grad()
    query.backward()
    outer.step()
    adapted[task] = list(fnet.parameters())
    if task % 5 == 4:
        print(f"task {task}: query {query.item():.4f}, {len(adapted)} adapted models")

spread = torch.stack([adapted[t][0].detach() for t in adapted]).std(0).mean()
print(f"spread of the first layer: {spread.item():.4f}")
