"""higher MAML on an attention model under bfloat16 autocast; weights stay in float32."""
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
meta = torch.optim.Adam(net.parameters(), lr=2e-3)
inner = torch.optim.SGD(net.parameters(), lr=0.3)
for it in range(10):
    c = torch.randn(3, 1, 4)
    y = torch.arange(3).repeat(6)
    x = c[y] + 0.3 * torch.randn(18, 5, 4)
    meta.zero_grad()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(fnet(x[:9]).float(), y[:9])
            diffopt.step(loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            query = F.cross_entropy(fnet(x[9:]).float(), y[9:])
        query.backward()
    meta.step()
    print(f"iter {it} support {loss.item():.4f} query {query.item():.4f}")
