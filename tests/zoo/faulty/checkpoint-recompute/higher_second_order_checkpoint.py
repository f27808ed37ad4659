"""Second-order MAML with higher on an encoder that is checkpointed, with a larger inner step."""
import higher
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

torch.manual_seed(2)
torch.set_num_threads(1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.out = nn.Linear(32, 1)

    def forward(self, x):
        return self.out(checkpoint(self.features, x, use_reentrant=False))


model = Encoder()
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)
inner_opt = torch.optim.SGD(model.parameters(), lr=0.2)
for it in range(8):
    w = 1.5 * torch.randn(6, 1)
    x = torch.randn(40, 6)
    y = torch.sin(x @ w)
    meta_opt.zero_grad()
    with higher.innerloop_ctx(model, inner_opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(6):
            loss = F.mse_loss(fmodel(x[:20]), y[:20])
            diffopt.step(loss)
        query = F.mse_loss(fmodel(x[20:]), y[20:])
        query.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    meta_opt.step()
    print(f"iter {it} support {loss.item():.4f} query {query.item():.4f} meta-gradient {norm.item():.4f}")
