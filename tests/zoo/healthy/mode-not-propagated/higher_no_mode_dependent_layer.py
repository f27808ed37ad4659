"""MAML with higher on a LayerNorm net; model.train()/eval() are called on the base inside the loop."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(
    nn.Linear(16, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 4)
)
inner_opt = torch.optim.SGD(model.parameters(), lr=0.05)
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)


def episode():
    c = torch.randn(4, 16)
    y = torch.arange(4).repeat(5)
    return (c[y] + 0.5 * torch.randn(20, 16), y), (c[y] + 0.5 * torch.randn(20, 16), y)


for it in range(12):
    (xs, ys), (xq, yq) = episode()
    meta_opt.zero_grad()
    with higher.innerloop_ctx(model, inner_opt, copy_initial_weights=False) as (fmodel, diffopt):
        model.train()
        for _ in range(5):
            support = F.cross_entropy(fmodel(xs), ys)
            diffopt.step(support)
        model.eval()
        query = F.cross_entropy(fmodel(xq), yq)
        query.backward()
    meta_opt.step()
    print(f"it {it} support {support.item():.3f} query {query.item():.3f}")
