"""Few-shot embedding with a spread regulariser on pairwise distances (eps under the root); MAML with higher."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)
body = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 8))
model = nn.ModuleDict({"body": body, "head": nn.Linear(8, 3)})


class Embedder(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.body, self.head = parts["body"], parts["head"]

    def forward(self, x):
        z = self.body(x)
        return self.head(z), z


def spread(z):
    d = (((z.unsqueeze(0) - z.unsqueeze(1)) ** 2).sum(-1) + 1e-4).sqrt()
    return torch.exp(-d).mean()


net = Embedder(model)
meta = torch.optim.Adam(net.parameters(), lr=1e-3)
inner = torch.optim.SGD(net.parameters(), lr=0.1)
for it in range(10):
    c = torch.randn(3, 10)
    y = torch.arange(3).repeat(6)
    x = c[y] + 0.3 * torch.randn(18, 10)
    meta.zero_grad()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fmodel, diffopt):
        for step in range(4):
            logits, z = fmodel(x[:9])
            loss = F.cross_entropy(logits, y[:9]) + 0.1 * spread(z)
            diffopt.step(loss)
        query = F.cross_entropy(fmodel(x[9:])[0], y[9:])
        query.backward()
    meta.step()
    print(f"iter {it} support {loss.item():.4f} query {query.item():.4f}")
