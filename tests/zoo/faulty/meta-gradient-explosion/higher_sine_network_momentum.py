"""Tunes a small sine network's initial weights through 60 unrolled momentum steps with higher."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden1 = nn.Linear(4, 16)
        self.hidden2 = nn.Linear(16, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        return torch.sin(self.out(torch.sin(self.hidden2(torch.sin(self.hidden1(x))))))


net = Net()
outer = torch.optim.Adam(net.parameters(), lr=1e-3)

for it in range(4):
    x = torch.randn(64, 4)
    y = torch.sign(x[:, :1] * x[:, 1:2])
    inner = torch.optim.SGD(net.parameters(), lr=0.55, momentum=0.9)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, opt):
        losses = []
        for _ in range(50):
            loss = F.mse_loss(fnet(x[:48]), y[:48])
            losses.append(loss.item())
            opt.step(loss)
        validation = F.mse_loss(fnet(x[48:]), y[48:])
    outer.zero_grad()
    validation.backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
    outer.step()
    shown = " ".join(f"{v:.3f}" for v in losses[::10])
    print(f"{it}: {shown} validation {validation.item():.3f} meta-gradient norm {norm:.3g}")
