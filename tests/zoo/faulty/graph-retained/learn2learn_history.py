"""learn2learn MAML that keeps every query loss for a plot, graph and all."""
import learn2learn as l2l
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(36)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
maml = l2l.algorithms.MAML(net, lr=0.1)
meta = torch.optim.Adam(maml.parameters(), lr=1e-3)
history = []
for it in range(12):
    (xs, ys), (xq, yq) = episode()
    learner = maml.clone()
    for _ in range(3):
        learner.adapt(F.cross_entropy(learner(xs), ys))
    query = F.cross_entropy(learner(xq), yq)
    meta.zero_grad()
    query.backward(retain_graph=True)
    meta.step()
    history.append(query)
print([round(q.item(), 3) for q in history])
