"""2-way 1-shot MAML with the usual four conv blocks on 16x16 images."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


def block(cin, cout):
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(cout), nn.ReLU()
    )


class Conv4(nn.Module):
    def __init__(self, hidden=16, n_way=2):
        super().__init__()
        self.encoder = nn.Sequential(
            block(1, hidden), block(hidden, hidden), block(hidden, hidden), block(hidden, hidden)
        )
        self.classifier = nn.Linear(hidden, n_way)

    def forward(self, x):
        return self.classifier(self.encoder(x).flatten(1))


def sample_task(n_way=2, shots=1, queries=8):
    protos = torch.randn(n_way, 1, 16, 16)
    protos = F.avg_pool2d(F.pad(protos, (2, 2, 2, 2), mode="circular"), 5, stride=1) * 4
    ys = torch.arange(n_way).repeat(shots)
    yq = torch.arange(n_way).repeat(queries)
    xs = protos[ys] + 0.3 * torch.randn(len(ys), 1, 16, 16)
    xq = protos[yq] + 0.3 * torch.randn(len(yq), 1, 16, 16)
    return xs, ys, xq, yq


def main():
    model = Conv4()
    meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    inner_opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for it in range(15):
        xs, ys, xq, yq = sample_task()
        meta_opt.zero_grad()
        with higher.innerloop_ctx(model, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(3):
                support = F.cross_entropy(fnet(xs), ys)
                diffopt.step(support)
            query = F.cross_entropy(fnet(xq), yq)
            query.backward()
        meta_opt.step()
        print(f"iter {it} support {support.item():.3f} query {query.item():.3f}")


if __name__ == "__main__":
    main()
