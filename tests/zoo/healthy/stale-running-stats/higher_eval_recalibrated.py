"""MAML with higher; before the meta-test the BN statistics are re-estimated on training images."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)
WAY, SHOT = 5, 5


class ConvNet(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, hidden, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.classifier = nn.Linear(hidden * 4, WAY)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.classifier(x.flatten(1))


def sample_task():
    protos = torch.rand(WAY, 1, 8, 8)
    y = torch.arange(WAY).repeat_interleave(SHOT)
    return [(protos[y] + 0.1 * torch.randn(len(y), 1, 8, 8), y) for _ in range(2)]


def run(model, inner_opt, steps, train):
    (xs, ys), (xq, yq) = sample_task()
    with higher.innerloop_ctx(
        model, inner_opt, copy_initial_weights=not train, track_higher_grads=train
    ) as (fnet, diffopt):
        first = None
        for _ in range(steps):
            loss = F.cross_entropy(fnet(xs), ys)
            first = loss.item() if first is None else first
            diffopt.step(loss)
        q = F.cross_entropy(fnet(xq), yq)
        if train:
            q.backward()
    return first, loss.item(), q.item()


def main():
    model = ConvNet()
    meta_opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    inner_opt = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for it in range(15):
        meta_opt.zero_grad()
        first, last, q = run(model, inner_opt, 3, train=True)
        meta_opt.step()
        print(f"[{it}] support {first:.3f} -> {last:.3f} query {q:.3f}")

    with torch.no_grad():
        for _ in range(60):
            model(sample_task()[0][0])
    model.eval()
    test_opt = torch.optim.SGD(model.parameters(), lr=0.004)
    for it in range(4):
        first, last, q = run(model, test_opt, 8, train=False)
        print(f"[test {it}] support {first:.3f} -> {last:.3f} query {q:.3f}")


if __name__ == "__main__":
    main()
