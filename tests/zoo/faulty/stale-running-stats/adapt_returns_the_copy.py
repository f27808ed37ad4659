"""First-order MAML with an adapt() that returns the copy only; the statistics never move (momentum 0)."""
import copy, torch
from torch import nn
torch.set_num_threads(1); torch.manual_seed(0)
net = nn.Sequential(nn.Linear(9, 32), nn.BatchNorm1d(32, momentum=0.), nn.ReLU(), nn.Linear(32, 3))
opt = torch.optim.Adam(net.parameters(), 1e-3)
def episode():
    c = torch.randn(3, 9) * 4 + 3; y = torch.arange(3).repeat(8); return *(c[y] + .4 * torch.randn(24, 9) for _ in 'ab'), y
def adapt(net, x, y):
    fast = copy.deepcopy(net)
    o = torch.optim.SGD(fast.parameters(), lr=.05)
    for _ in range(3):
        o.zero_grad(); nn.functional.cross_entropy(fast(x), y).backward(); o.step()
    return fast
net.train()
for t in range(8):
    x, xq, y = episode()
    fast = adapt(net, x, y)
    fast.zero_grad(); nn.functional.cross_entropy(fast(xq), y).backward()
    for p, f in zip(net.parameters(), fast.parameters()): p.grad = f.grad.clone()
    opt.step()
for t in range(6):
    x, xq, y = episode(); fast = adapt(net, x, y); fast.eval()
    with torch.no_grad(): out = fast(xq); print((out.argmax(1) == y).float().mean().item(), nn.functional.cross_entropy(out, y).item())
