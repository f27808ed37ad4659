"""DARTS second order, unrolled one step by hand with a deep copy, finite-difference Hessian product."""

import copy, torch
from torch import nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)


class Mixed(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ops = nn.ModuleList([nn.Linear(d, d), nn.Sequential(nn.Linear(d, d), nn.ReLU()), nn.Identity()])

    def forward(self, x, a):
        return sum(w * op(x) for w, op in zip(a, self.ops))


class Net(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.cells = nn.ModuleList([Mixed(d) for _ in range(2)])
        self.out = nn.Linear(d, 3)
        self.alpha = nn.Parameter(1e-3 * torch.randn(2, 3))

    def forward(self, x):
        for c, a in zip(self.cells, self.alpha.softmax(-1)):
            x = c(x, a)
        return self.out(x)

    def weights(self):
        return [p for n, p in self.named_parameters() if n != "alpha"]


net = Net()
w_opt = torch.optim.SGD(net.weights(), 0.05, momentum=0.9)
a_opt = torch.optim.Adam([net.alpha], 3e-3)
W = torch.randn(8, 3)


def data(n=64):
    x = torch.randn(n, 8)
    return x, (x @ W).argmax(1)


xi = 0.05
for step in range(30):
    xt, yt = data()
    xv, yv = data()
    model = copy.deepcopy(net)
    loss = F.cross_entropy(model(xt), yt)
    grads = torch.autograd.grad(loss, model.weights())
    with torch.no_grad():
        for p, g in zip(model.weights(), grads):
            p -= xi * g
    vloss = F.cross_entropy(model(xv), yv)
    vg = torch.autograd.grad(vloss, [model.alpha] + model.weights())
    da, dw = vg[0], vg[1:]
    eps = 0.01 / torch.cat([g.flatten() for g in dw]).norm()

    def alpha_grad(sign):
        with torch.no_grad():
            for p, d in zip(net.weights(), dw):
                p += sign * eps * d
        (g,) = torch.autograd.grad(F.cross_entropy(net(xt), yt), net.alpha)
        with torch.no_grad():
            for p, d in zip(net.weights(), dw):
                p -= sign * eps * d
        return g

    hess = (alpha_grad(1) - alpha_grad(-1)) / (2 * eps)
    net.alpha.grad = da - xi * hess
    a_opt.step()
    w_opt.zero_grad()
    l = F.cross_entropy(net(xt), yt)
    l.backward()
    w_opt.step()
    print(step, l.item(), vloss.item())
