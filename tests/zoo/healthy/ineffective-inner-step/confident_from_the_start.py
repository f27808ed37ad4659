"""Marginal entropy minimisation, one step a sample, on a source model that is sure of most of them."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
centres = 1.5 * torch.randn(4, 16)


def data(count):
    y = torch.randint(4, (count,))
    return centres[y] + 0.7 * torch.randn(count, 16), y


def marginal_entropy(logits):
    mean = logits.log_softmax(1).logsumexp(0) - torch.log(torch.tensor(float(len(logits))))
    return -(mean * mean.exp()).sum()


net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(400):
    x, y = data(64)
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()

source = copy.deepcopy(net.state_dict())
for sample in range(40):
    net.load_state_dict(source)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.005)
    views = data(1)[0] + 0.3 * torch.randn(16, 16)
    optimizer.zero_grad()
    loss = marginal_entropy(net(views))
    loss.backward()
    optimizer.step()
    if sample % 10 == 0:
        print(sample, f"{loss.item():.2e}")
