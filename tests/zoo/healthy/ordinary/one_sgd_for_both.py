"""One SGD adapts the weights, and takes the outer step once they are put back."""
import torch, torch.nn as nn
torch.manual_seed(0)
net = nn.Linear(4, 1); opt = torch.optim.SGD(net.parameters(), lr=0.05)
def mse(): x = torch.randn(12, 4); return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean()
for it in range(6):
    meta = [torch.zeros_like(p) for p in net.parameters()]
    for t in range(3):
        backup = [p.detach().clone() for p in net.parameters()]
        for _ in range(2): opt.zero_grad(); mse().backward(); opt.step()
        opt.zero_grad(); mse().backward()
        for m, p in zip(meta, net.parameters()): m.add_(p.grad, alpha=1 / 3)
        with torch.no_grad():
            for p, b in zip(net.parameters(), backup): p.copy_(b)
    for p, m in zip(net.parameters(), meta): p.grad = m
    opt.step()
print(net.weight.tolist())
