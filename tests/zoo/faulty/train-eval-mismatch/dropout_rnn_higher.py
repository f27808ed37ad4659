"""MAML with higher on a GRU with dropout: adapted with dropout off, the query trained with it on."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(8)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 16, batch_first=True)
        self.drop = nn.Dropout(0.4)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.drop(self.rnn(x)[0][:, -1]))


def episode():
    y = torch.arange(3).repeat(8)
    x = torch.randn(3, 1, 4)[y] + 0.5 * torch.randn(24, 6, 4)
    return x[:12], y[:12], x[12:], y[12:]


net = Net()
meta = torch.optim.Adam(net.parameters(), lr=3e-3)
inner = torch.optim.SGD(net.parameters(), lr=0.1)
for it in range(8):
    xs, ys, xq, yq = episode()
    meta.zero_grad()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        fnet.eval()
        for _ in range(3):
            diffopt.step(F.cross_entropy(fnet(xs), ys))
        fnet.train()
        query = F.cross_entropy(fnet(xq), yq)
        query.backward()
    meta.step()
    print(it, query.item())
