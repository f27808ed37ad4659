"""A residual regressor meta-trained with higher; one block is defined but never called in forward."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(2)
torch.set_num_threads(1)


class Residual(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.block1 = nn.Linear(width, width)
        self.block2 = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        h = h + torch.tanh(self.block1(h))
        return self.out(h)


net = Residual()
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)
for it in range(8):
    x = torch.randn(30, 3)
    y = torch.tanh(x @ torch.randn(3, 1))
    inner = torch.optim.SGD(net.parameters(), lr=0.03)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (f, opt):
        losses = []
        for _ in range(4):
            loss = F.mse_loss(f(x[:15]), y[:15])
            losses.append(loss.item())
            opt.step(loss)
        query = F.mse_loss(f(x[15:]), y[15:])
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"{it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
