"""higher MAML on a tiny attention model under float16 autocast."""
import higher
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(3)
torch.set_num_threads(1)


class TinyAttention(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.q = nn.Linear(4, dim)
        self.k = nn.Linear(4, dim)
        self.v = nn.Linear(4, dim)
        self.out = nn.Linear(dim, 3)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(1, 2) / q.size(-1) ** 0.5
        return self.out((scores.softmax(-1) @ v).mean(1))


net = TinyAttention()
meta = torch.optim.Adam(net.parameters(), lr=1e-3)
inner = torch.optim.SGD(net.parameters(), lr=1e-3)
for it in range(6):
    scale = 1.0 if it < 3 else 400.0  # the later tasks come in millivolts
    c = torch.randn(3, 1, 4)
    y = torch.arange(3).repeat(6)
    x = scale * (c[y] + 0.3 * torch.randn(18, 5, 4))
    meta.zero_grad()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                logits = fnet(x[:9])
            loss = F.cross_entropy(logits.float(), y[:9])
            diffopt.step(loss)
        with torch.autocast("cpu", dtype=torch.float16):
            logits = fnet(x[9:])
        query = F.cross_entropy(logits.float(), y[9:])
        query.backward()
    meta.step()
    print(f"iter {it} support {loss.item():.4f} query {query.item():.4f}")
