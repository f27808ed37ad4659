"""A ridge of gradient steps on a new head: the features it is adapted on are detached, and so is the query's."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(17)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
head = nn.Linear(16, 4)
meta = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
for it in range(8):
    (xs, ys), (xq, yq) = episode()
    features, asked = body(xs).detach(), body(xq).detach()
    w, b = head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()
    for _ in range(5):
        gw, gb = torch.autograd.grad(F.cross_entropy(F.linear(features, w, b), ys), (w, b))
        w = (w - 0.1 * gw).detach().requires_grad_()
        b = (b - 0.1 * gb).detach().requires_grad_()
    query = F.cross_entropy(F.linear(asked, w, b), yq)
    meta.zero_grad()
    query.backward()
    meta.step()
    print(it, query.item())
