"""TorchOpt MetaSGD on a recurrent net whose time steps are checkpointed in chunks."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt
from torch.utils.checkpoint import checkpoint

torch.manual_seed(3)
torch.set_num_threads(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(2, 20)
        self.readout = nn.Linear(20, 1)

    def chunk(self, x, h):
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
        return h

    def forward(self, x):
        h = x.new_zeros(x.size(0), 20)
        for part in x.split(4, dim=1):
            h = checkpoint(self.chunk, part, h, use_reentrant=False)
        return self.readout(h)


net = Recurrent()
inner = torchopt.MetaSGD(net, lr=0.3)
outer = torch.optim.Adam(net.parameters(), lr=2e-3)
for it in range(6):
    net_state = torchopt.extract_state_dict(net, by="reference")
    opt_state = torchopt.extract_state_dict(inner, by="reference")
    mix = torch.randn(2, 1)
    x = torch.randn(24, 8, 2)
    y = torch.tanh(x.mean(1) @ mix * 3)
    trace = []
    for _ in range(4):
        loss = F.mse_loss(net(x[:12]), y[:12])
        inner.step(loss)
        trace.append(round(loss.item(), 4))
    query = F.mse_loss(net(x[12:]), y[12:])
    outer.zero_grad()
    query.backward()
    torchopt.recover_state_dict(net, net_state)
    torchopt.recover_state_dict(inner, opt_state)
    outer.step()
    print(f"iter {it} inner {trace} query {query.item():.4f}")
