"""Learned optimizer: coordinatewise LSTM proposes updates of a quadratic's parameters (Andrychowicz)."""

import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)


class LO(nn.Module):
    def __init__(s, h=16):
        super().__init__()
        s.cell = nn.LSTMCell(1, h)
        s.out = nn.Linear(h, 1)
        s.h = h
        nn.init.normal_(s.out.weight, std=0.01)

    def forward(s, g, st):
        st = s.cell(g, st)
        return 0.1 * s.out(st[0]), st


lo = LO()
opt = torch.optim.Adam(lo.parameters(), 3e-3)
for it in range(10):
    A, b = torch.randn(10, 10) / 3, torch.randn(10)
    th = torch.randn(10, requires_grad=True)
    st = (torch.zeros(10, 16), torch.zeros(10, 16))
    total = 0
    for _ in range(10):
        l = (A @ th - b).pow(2).mean()
        (g,) = torch.autograd.grad(l, th, retain_graph=True)
        u, st = lo(g.detach()[:, None], st)
        th = th + u.squeeze(1)
        total = total + l
    opt.zero_grad()
    (total / 10).backward()
    opt.step()
    print(it, total.item() / 10)
