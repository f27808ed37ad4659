"""A classifier pretrained on all classes is adapted with higher; the support set is small, the query set is scored in eval."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24 * 4, 8)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


protos = torch.randn(8, 1, 8, 8)


def batch(y, rotate=False):
    x = protos[y] + 1.2 * torch.randn(len(y), 1, 8, 8)
    return x.transpose(2, 3) if rotate else x


def main():
    net = Net()
    opt = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(60):
        y = torch.randint(0, 8, (32,))
        loss = F.cross_entropy(net(batch(y)), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print("pretrained", loss.item())

    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    meta = torch.optim.Adam(net.parameters(), lr=5e-4)
    for it in range(6):
        ys = torch.randperm(8)[:2].repeat(3)
        yq = ys.repeat(4)
        xs, xq = batch(ys, True), batch(yq, True)
        meta.zero_grad()
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
            fnet.train()
            for _ in range(4):
                support = F.cross_entropy(fnet(xs), ys)
                diffopt.step(support)
            fnet.eval()
            query = F.cross_entropy(fnet(xq), yq)
            query.backward()
        meta.step()
        print(f"it {it} support {support.item():.3f} query {query.item():.3f}")


if __name__ == "__main__":
    main()
