"""TorchOpt MAML with state extracted by reference, which is the fastest way."""
import torch
import torch.nn.functional as F
import torchopt
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(8)


class ConvBN(nn.Module):
    def __init__(self, n_way=3):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Linear(8 * 16, n_way)

    def forward(self, x):
        return self.out(self.layer2(self.layer1(x)).flatten(1))


def get_task(offset):
    proto = offset + torch.randn(3, 1, 8, 8)
    y = torch.arange(3).repeat(12)
    x = proto[y] + 0.4 * torch.randn(36, 1, 8, 8)
    return (x[:18], y[:18]), (x[18:], y[18:])


def inner_loop(net, inner_opt, xs, ys, steps=3):
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(net(xs), ys)
        inner_opt.step(loss)
        losses.append(round(loss.item(), 3))
    return losses


net = ConvBN()
inner_opt = torchopt.MetaSGD(net, lr=0.05)
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

for it in range(10):
    net_state = torchopt.extract_state_dict(net, by="reference", with_buffers=True)
    opt_state = torchopt.extract_state_dict(inner_opt, by="reference")
    meta_opt.zero_grad()
    for _ in range(2):
        (xs, ys), (xq, yq) = get_task(torch.randn(1).item())
        losses = inner_loop(net, inner_opt, xs, ys)
        query = F.cross_entropy(net(xq), yq)
        query.backward()
        torchopt.recover_state_dict(net, net_state)
        torchopt.recover_state_dict(inner_opt, opt_state)
    meta_opt.step()
    print("iter", it, "inner", losses, "query", round(query.item(), 3))

net_state = torchopt.extract_state_dict(net, by="reference", with_buffers=True)
opt_state = torchopt.extract_state_dict(inner_opt, by="reference")
for offset in (5.0, -5.0, 10.0):
    (xs, ys), (xq, yq) = get_task(offset)
    print("test", inner_loop(net, inner_opt, xs, ys, 5), F.cross_entropy(net(xq), yq).item())
    torchopt.recover_state_dict(net, net_state)
    torchopt.recover_state_dict(inner_opt, opt_state)
print("running mean of layer1 now:", net.layer1[1].running_mean.mean().item())
