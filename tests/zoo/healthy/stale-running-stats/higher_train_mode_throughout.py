"""Plain MAML with higher: the net stays in train mode in meta-training and meta-test."""
from higher import innerloop_ctx
import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(5)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 3),
)
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
inner_opt = torch.optim.SGD(net.parameters(), lr=0.05)
ce = nn.CrossEntropyLoss()


def episode():
    protos = 100 + 50 * torch.randn(3, 1, 8, 8)     # not normalised, BN takes care of it
    y = torch.arange(3).repeat(6)
    x = protos[y] + 15 * torch.randn(18, 1, 8, 8)
    return x[:9], y[:9], x[9:], y[9:]


for it in range(10):
    meta_opt.zero_grad()
    total = 0.0
    for _ in range(2):
        xs, ys, xq, yq = episode()
        with innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(3):
                diffopt.step(ce(fnet(xs), ys))
            loss = ce(fnet(xq), yq)
            loss.backward()
            total += loss.item()
    meta_opt.step()
    print("iter", it, "query", total / 2)

for t in range(3):
    xs, ys, xq, yq = episode()
    with innerloop_ctx(net, inner_opt, track_higher_grads=False) as (fnet, diffopt):
        for _ in range(5):
            loss = ce(fnet(xs), ys)
            diffopt.step(loss)
        print("test", t, "support", loss.item(), "query", ce(fnet(xq), yq).item())
