"""The higher MAML example, trained in train mode; statistics are re-estimated, then it is tested in eval mode at a lower rate."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
PROTOTYPES = torch.randn(40, 1, 12, 12, generator=draw)


def images(classes, shots):
    y = torch.arange(5).repeat(shots)
    return PROTOTYPES[classes[y]] + 0.5 * torch.randn(len(y), 1, 12, 12, generator=draw), y


def episode():
    classes = torch.randperm(40, generator=draw)[:5]
    return *images(classes, 5), *images(classes, 8)


net = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
    nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * 9, 5),
)
meta = torch.optim.Adam(net.parameters(), lr=1e-3)
inner = torch.optim.SGD(net.parameters(), lr=0.1)
for it in range(5):
    meta.zero_grad()
    for _ in range(3):
        xs, ys, xq, yq = episode()
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(4):
                diffopt.step(F.cross_entropy(fnet(xs), ys))
            query = F.cross_entropy(fnet(xq), yq)
            query.backward()
    meta.step()
    print("train", it, query.item())

with torch.no_grad():
    for _ in range(60):
        net(episode()[0])
net.eval()
inner = torch.optim.SGD(net.parameters(), lr=0.02)
for it in range(12):
    xs, ys, xq, yq = episode()
    with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (fnet, diffopt):
        losses = []
        for _ in range(6):
            loss = F.cross_entropy(fnet(xs), ys)
            diffopt.step(loss)
            losses.append(round(loss.item(), 2))
        print("test", it, losses, F.cross_entropy(fnet(xq), yq).item())
