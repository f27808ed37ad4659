"""2-way 1-shot MAML, four conv blocks down to one pixel, with GroupNorm."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


def block(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.MaxPool2d(2), nn.GroupNorm(2, cout), nn.ReLU())


model = nn.Sequential(block(1, 16), block(16, 16), block(16, 16), block(16, 16), nn.Flatten(), nn.Linear(16, 2))
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)
inner_opt = torch.optim.SGD(model.parameters(), lr=0.02)


def sample_task():
    protos = F.interpolate(torch.randn(2, 1, 4, 4), 16)
    ys, yq = torch.arange(2), torch.arange(2).repeat(8)
    return (
        protos[ys] + 0.1 * torch.randn(2, 1, 16, 16), ys,
        protos[yq] + 0.1 * torch.randn(16, 1, 16, 16), yq,
    )


for it in range(15):
    xs, ys, xq, yq = sample_task()
    meta_opt.zero_grad()
    with higher.innerloop_ctx(model, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
        for _ in range(4):
            support = F.cross_entropy(fnet(xs), ys)
            diffopt.step(support)
        query = F.cross_entropy(fnet(xq), yq)
        query.backward()
    meta_opt.step()
    print(f"iter {it} support {support.item():.3f} query {query.item():.3f}")
