"""MAML with higher and BatchNorm layers built with track_running_stats=False."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


def conv_block(cin, cout):
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1),
        nn.BatchNorm2d(cout, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


net = nn.Sequential(conv_block(1, 12), conv_block(12, 12), nn.Flatten(), nn.Linear(48, 3))
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
inner_opt = torch.optim.SGD(net.parameters(), lr=0.05)


def sample_task():
    protos = torch.randn(3, 1, 8, 8)
    y = torch.arange(3).repeat(5)
    return [(protos[y] + 0.5 * torch.randn(15, 1, 8, 8), y) for _ in range(2)]


for it in range(16):
    training = it < 12
    (xs, ys), (xq, yq) = sample_task()
    with higher.innerloop_ctx(
        net, inner_opt, copy_initial_weights=not training, track_higher_grads=training
    ) as (fnet, diffopt):
        for _ in range(4):
            support = F.cross_entropy(fnet(xs), ys)
            diffopt.step(support)
        query = F.cross_entropy(fnet(xq), yq)
        if training:
            meta_opt.zero_grad()
            query.backward()
            meta_opt.step()
    print(f"{'train' if training else 'test'} {it} support {support.item():.3f} query {query.item():.3f}")
