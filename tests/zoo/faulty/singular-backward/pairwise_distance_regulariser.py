"""Few-shot embedding with a spread regulariser on pairwise distances; MAML with higher."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        z = self.body(x)
        return self.head(z), z


def spread(z):
    d = ((z.unsqueeze(0) - z.unsqueeze(1)) ** 2).sum(-1).sqrt()
    return torch.exp(-d).mean()


def task():
    c = torch.randn(3, 10)
    y = torch.arange(3).repeat(6)
    x = c[y] + 0.3 * torch.randn(18, 10)
    return x[:9], y[:9], x[9:], y[9:]


model = Embedder()
meta = torch.optim.Adam(model.parameters(), lr=1e-3)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
for it in range(5):
    xs, ys, xq, yq = task()
    meta.zero_grad()
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fmodel, diffopt):
        for step in range(4):
            logits, z = fmodel(xs)
            loss = F.cross_entropy(logits, ys) + 0.1 * spread(z)
            diffopt.step(loss)
            print(f"   step {step} loss {loss.item():.4f}")
        query = F.cross_entropy(fmodel(xq)[0], yq)
        query.backward()
    meta.step()
    print(f"iter {it} query {query.item():.4f}")
