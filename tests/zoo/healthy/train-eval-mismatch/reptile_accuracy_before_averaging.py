"""Reptile on a pretrained net with BatchNorm; each task prints its accuracy in eval mode before the average."""
import copy, torch, torch.nn as nn
torch.set_num_threads(1); torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)); n = 0
def task():
    A = torch.randn(6, 3); return lambda k: (lambda x: (x, (x @ A).argmax(1)))(torch.randn(k, 6))
o = torch.optim.SGD(net.parameters(), .05); f = task()
for _ in range(60): x, y = f(64); o.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); o.step()
for t in range(16):
    f = task(); w = copy.deepcopy(net.state_dict()); inner = torch.optim.SGD(net.parameters(), .05); net.train()
    for k in range(5): x, y = f(64); inner.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); inner.step(); n += 1
    net.eval()
    with torch.no_grad(): x, y = f(200); print(t, (net(x).argmax(1) == y).float().mean().item())
    a = net.state_dict(); net.load_state_dict({k: w[k] + .3*(a[k] - w[k]) if a[k].is_floating_point() and 'running' not in k else w[k] for k in w})
print('COUNT tasks=16 inner=%d outer=16' % n)
