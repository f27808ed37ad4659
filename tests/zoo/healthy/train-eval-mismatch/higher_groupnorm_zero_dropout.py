"""MAML with higher on a GroupNorm conv net whose dropout rate is set to zero by the config."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(3)
torch.set_num_threads(1)
CONFIG = {"dropout": 0.0, "inner_lr": 0.02, "inner_steps": 4}


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(CONFIG["dropout"]), nn.Linear(64, 4),
    )


def episode():
    protos = torch.randn(4, 1, 8, 8)
    y = torch.arange(4).repeat(3)
    return [(protos[y] + 0.3 * torch.randn(12, 1, 8, 8), y) for _ in range(2)]


net = make_net()
meta = torch.optim.Adam(net.parameters(), lr=2e-3)
inner = torch.optim.SGD(net.parameters(), lr=CONFIG["inner_lr"])
for it in range(12):
    (xs, ys), (xq, yq) = episode()
    meta.zero_grad()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        fnet.train()
        for _ in range(CONFIG["inner_steps"]):
            support = F.cross_entropy(fnet(xs), ys)
            diffopt.step(support)
        fnet.eval()
        query = F.cross_entropy(fnet(xq), yq)
        query.backward()
    meta.step()
    print(f"it {it} support {support.item():.3f} query {query.item():.3f}")
