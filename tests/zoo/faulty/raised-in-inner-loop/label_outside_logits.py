"""5-way episodes drawn from 8 classes, with the original class ids as labels; higher conv net."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(3)
torch.set_num_threads(1)

CLASSES, WAYS = 8, 5
prototypes = torch.randn(CLASSES, 1, 8, 8)
net = nn.Sequential(
    nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, WAYS)
)
outer = torch.optim.Adam(net.parameters(), lr=1e-3)


def episode(first):
    classes = torch.arange(first, first + WAYS)
    labels = classes.repeat(3)
    return prototypes[labels] + 0.3 * torch.randn(len(labels), 1, 8, 8), labels


for it in range(4):
    xs, ys = episode(it)
    xq, yq = episode(it)
    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, opt):
        for _ in range(3):
            loss = F.cross_entropy(fnet(xs), ys)
            opt.step(loss)
        query = F.cross_entropy(fnet(xq), yq)
    outer.zero_grad()
    query.backward()
    outer.step()
    print(f"it {it}: support {loss.item():.3f} query {query.item():.3f}")
