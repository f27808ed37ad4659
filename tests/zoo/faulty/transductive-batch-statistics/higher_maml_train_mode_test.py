"""Reference-style MAML with higher: 3-way conv-BN net, meta-test in the same mode as meta-training."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


def conv_block(cin, cout):
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(), nn.MaxPool2d(2)
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(conv_block(1, 12), conv_block(12, 12))
        self.fc = nn.Linear(48, 3)

    def forward(self, x):
        return self.fc(self.net(x).flatten(1))


def sample_task():
    protos = torch.randn(3, 1, 8, 8)
    y = torch.arange(3).repeat(5)
    return [(protos[y] + 0.5 * torch.randn(15, 1, 8, 8), y) for _ in range(2)]


def main():
    net = Net()
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
    inner_opt = torch.optim.SGD(net.parameters(), lr=0.05)
    for it in range(12):
        (xs, ys), (xq, yq) = sample_task()
        meta_opt.zero_grad()
        with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(4):
                support = F.cross_entropy(fnet(xs), ys)
                diffopt.step(support)
            query = F.cross_entropy(fnet(xq), yq)
            query.backward()
        meta_opt.step()
        print(f"train {it} support {support.item():.3f} query {query.item():.3f}")
    for it in range(4):
        (xs, ys), (xq, yq) = sample_task()
        with higher.innerloop_ctx(net, inner_opt, track_higher_grads=False) as (fnet, diffopt):
            for _ in range(6):
                support = F.cross_entropy(fnet(xs), ys)
                diffopt.step(support)
            acc = (fnet(xq).argmax(1) == yq).float().mean().item()
        print(f"test {it} support {support.item():.3f} acc {acc:.2f}")


if __name__ == "__main__":
    main()
