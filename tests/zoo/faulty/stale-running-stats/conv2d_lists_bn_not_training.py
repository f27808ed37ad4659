"""Functional conv net with explicit parameter and BN lists, in the style of MAML-Pytorch."""
import torch
from torch.nn import functional as F
from torch import autograd

torch.manual_seed(7)
torch.set_num_threads(1)


class Learner:
    def __init__(self, n_way):
        self.vars = []
        self.vars_bn = []
        for cin, cout in [(1, 16), (16, 16), (16, 16)]:
            w = torch.empty(cout, cin, 3, 3)
            torch.nn.init.kaiming_normal_(w)
            self.vars += [w, torch.zeros(cout), torch.ones(cout), torch.zeros(cout)]
            self.vars_bn += [torch.zeros(cout), torch.ones(cout)]
        head = torch.empty(n_way, 16)
        torch.nn.init.kaiming_normal_(head)
        self.vars += [head, torch.zeros(n_way)]
        for v in self.vars:
            v.requires_grad_(True)

    def __call__(self, x, vars=None, bn_training=True):
        vars = self.vars if vars is None else vars
        for layer in range(3):
            w, b, gamma, beta = vars[4 * layer : 4 * layer + 4]
            mean, var = self.vars_bn[2 * layer : 2 * layer + 2]
            x = F.conv2d(x, w, b, stride=1, padding=1)
            x = F.batch_norm(x, mean, var, gamma, beta, training=bn_training)
            x = F.max_pool2d(F.relu(x), 2)
        return F.linear(x.flatten(1), vars[-2], vars[-1])


def task(n_way=4, k=5):
    centers = 6 * torch.randn(n_way, 1, 8, 8) + 12
    lab = torch.arange(n_way).repeat(k)
    return [(centers[lab] + torch.randn(n_way * k, 1, 8, 8), lab) for _ in range(2)]


net = Learner(4)
meta_optim = torch.optim.Adam(net.vars, lr=1e-3)
for it in range(8):
    (x_spt, y_spt), (x_qry, y_qry) = task()
    fast = net.vars
    for k in range(3):
        loss = F.cross_entropy(net(x_spt, fast, bn_training=False), y_spt)
        grad = autograd.grad(loss, fast, create_graph=True)
        fast = [p - 0.04 * g for p, g in zip(fast, grad)]
        print("  support", k, loss.item())
    loss_q = F.cross_entropy(net(x_qry, fast, bn_training=False), y_qry)
    meta_optim.zero_grad()
    loss_q.backward()
    meta_optim.step()
    print("iter", it, "query loss", loss_q.item())
