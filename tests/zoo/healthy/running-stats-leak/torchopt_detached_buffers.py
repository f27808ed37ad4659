"""TorchOpt MAML on a conv-BN net; the network is extracted with its own copy of the buffers."""
import torch
import torch.nn.functional as F
import torchopt
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(8)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Flatten(), nn.Linear(8 * 16, 3),
)
inner_opt = torchopt.MetaSGD(net, lr=0.05)
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)


def get_task():
    proto = torch.randn(1) + torch.randn(3, 1, 8, 8)
    y = torch.arange(3).repeat(12)
    x = proto[y] + 0.4 * torch.randn(36, 1, 8, 8)
    return (x[:18], y[:18]), (x[18:], y[18:])


for it in range(12):
    net_state = torchopt.extract_state_dict(net, by="reference", with_buffers=True, detach_buffers=True)
    opt_state = torchopt.extract_state_dict(inner_opt, by="copy")
    meta_opt.zero_grad()
    (xs, ys), (xq, yq) = get_task()
    for k in range(3):
        loss = F.cross_entropy(net(xs), ys)
        inner_opt.step(loss)
    query = F.cross_entropy(net(xq), yq)
    query.backward()
    torchopt.recover_state_dict(net, net_state)
    torchopt.recover_state_dict(inner_opt, opt_state)
    meta_opt.step()
    print("iter", it, "support", round(loss.item(), 3), "query", round(query.item(), 3))
