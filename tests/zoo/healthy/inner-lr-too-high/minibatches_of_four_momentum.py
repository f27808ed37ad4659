"""Inner SGD with momentum on minibatches of four: noisy losses, healthy."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(40)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


net = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 4))
for task in range(15):
    (x, y), (xq, yq) = episode(10)
    learner = copy.deepcopy(net)
    inner = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        pick = torch.randint(0, len(y), (4,))
        inner.zero_grad()
        loss = F.cross_entropy(learner(x[pick]), y[pick])
        loss.backward()
        inner.step()
        losses.append(round(loss.item(), 2))
    print(task, losses)
