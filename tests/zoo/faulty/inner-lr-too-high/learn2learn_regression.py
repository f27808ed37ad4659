"""learn2learn MAML on noisy sinusoids with a LayerNorm net."""
import learn2learn as l2l
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(9)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
maml = l2l.algorithms.MAML(net, lr=1.5)
meta = torch.optim.Adam(maml.parameters(), lr=1e-3)
for it in range(6):
    meta.zero_grad()
    for _ in range(2):
        a, b = 1 + 2 * torch.rand(1), 3 * torch.rand(1)
        x = 8 * torch.rand(20, 1) - 4
        y = a * torch.sin(x + b) + 0.05 * torch.randn(20, 1)
        learner = maml.clone()
        for _ in range(5):
            learner.adapt(F.mse_loss(learner(x[:10]), y[:10]))
        query = F.mse_loss(learner(x[10:]), y[10:])
        query.backward()
    torch.nn.utils.clip_grad_norm_(maml.parameters(), 10.0) if it % 3 == 0 else None
    meta.step()
    print(it, query.item())
