"""MAML with higher.innerloop_ctx on a GroupNorm conv net; the outer Adam steps after each meta-batch."""
from higher import innerloop_ctx
import torch
import torch.nn.functional as F
from torch import nn, optim

torch.manual_seed(0)
torch.set_num_threads(1)

WAYS, SHOTS = 4, 3


def conv_block(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.GroupNorm(2, cout), nn.ReLU(), nn.MaxPool2d(2))


model = nn.Sequential(conv_block(1, 8), conv_block(8, 8), nn.Flatten(), nn.Linear(32, WAYS))
meta_opt = optim.Adam(model.parameters(), lr=1e-3)

for it in range(6):
    meta_opt.zero_grad()
    meta_loss = 0.0
    for _ in range(2):
        protos = torch.randn(WAYS, 1, 8, 8)
        y = torch.arange(WAYS).repeat(SHOTS)
        xs = protos[y] + 0.3 * torch.randn(len(y), 1, 8, 8)
        xq = protos[y] + 0.3 * torch.randn(len(y), 1, 8, 8)
        inner_opt = optim.SGD(model.parameters(), lr=0.05)
        with innerloop_ctx(model, inner_opt) as (fmodel, diffopt):
            for _ in range(4):
                diffopt.step(F.cross_entropy(fmodel(xs), y))
            query = F.cross_entropy(fmodel(xq), y)
            query.backward()
            meta_loss += query.item() / 2
    meta_opt.step()
    print(f"iteration {it}: meta loss {meta_loss:.4f}")
