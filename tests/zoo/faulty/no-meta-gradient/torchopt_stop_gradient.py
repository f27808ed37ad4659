"""TorchOpt: the adapted state is cut off before the query, as one does for an evaluation."""
import torchopt
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(31)
torch.set_num_threads(1)


def episode(shots=5, ways=4, width=12):
    centres = 1.5 * torch.randn(ways, width)
    y = torch.arange(ways).repeat(shots)
    return [(centres[y] + 0.6 * torch.randn(len(y), width), y) for _ in range(2)]


net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
inner = torchopt.MetaSGD(net, lr=0.1)
meta = torch.optim.Adam(net.parameters(), lr=1e-3)
for it in range(6):
    (xs, ys), (xq, yq) = episode()
    net_state = torchopt.extract_state_dict(net, by="reference")
    inner_state = torchopt.extract_state_dict(inner, by="reference")
    for _ in range(3):
        inner.step(F.cross_entropy(net(xs), ys))
    torchopt.stop_gradient(net)
    query = F.cross_entropy(net(xq), yq)
    meta.zero_grad()
    query.backward()
    torchopt.recover_state_dict(net, net_state)
    torchopt.recover_state_dict(inner, inner_state)
    meta.step()
    print(it, query.item())
