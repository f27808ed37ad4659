"""MAML with higher on small grey-scale images (pixel values 0-255), then a meta-test pass."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)

N_WAY, K_SHOT, K_QUERY = 5, 5, 5


def conv_block(cin, cout):
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class ConvNet(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.features = nn.Sequential(conv_block(1, hidden), conv_block(hidden, hidden))
        self.classifier = nn.Linear(hidden * 4, N_WAY)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def sample_task():
    protos = torch.randint(0, 256, (N_WAY, 1, 8, 8)).float()

    def draw(k):
        x = protos.repeat_interleave(k, 0) + 20 * torch.randn(N_WAY * k, 1, 8, 8)
        return x.clamp(0, 255), torch.arange(N_WAY).repeat_interleave(k)

    return draw(K_SHOT), draw(K_QUERY)


def main():
    model = ConvNet()
    meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    inner_opt = torch.optim.SGD(model.parameters(), lr=0.1)

    model.train()
    for it in range(12):
        (xs, ys), (xq, yq) = sample_task()
        meta_opt.zero_grad()
        with higher.innerloop_ctx(model, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(3):
                diffopt.step(F.cross_entropy(fnet(xs), ys))
            loss = F.cross_entropy(fnet(xq), yq)
            loss.backward()
        meta_opt.step()
        print(f"[train {it}] query loss {loss.item():.3f}")

    model.eval()
    for it in range(4):
        (xs, ys), (xq, yq) = sample_task()
        with higher.innerloop_ctx(model, inner_opt, track_higher_grads=False) as (fnet, diffopt):
            for _ in range(5):
                loss = F.cross_entropy(fnet(xs), ys)
                diffopt.step(loss)
            acc = (fnet(xq).argmax(1) == yq).float().mean()
        print(f"[test {it}] support loss {loss.item():.3f} query acc {acc.item():.2f}")


if __name__ == "__main__":
    main()
