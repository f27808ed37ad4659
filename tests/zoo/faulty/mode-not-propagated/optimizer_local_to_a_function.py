"""The base is put into eval mode, the copy under adaptation is not; optimizer and copy end with the function."""
import copy, torch
from torch import nn
torch.set_num_threads(1); torch.manual_seed(0)
net = nn.Sequential(nn.Linear(9, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.3), nn.Linear(32, 3))
def evaluate():
    c = torch.randn(3, 9) * 1.5; y = torch.arange(3).repeat(8); x, xq = (c[y] + .4 * torch.randn(24, 9) for _ in 'ab')
    net.train()
    fast = copy.deepcopy(net)
    o = torch.optim.SGD(fast.parameters(), lr=.05)
    for _ in range(3):
        o.zero_grad(); nn.functional.cross_entropy(fast(x), y).backward(); o.step()
    net.eval()
    with torch.no_grad(): print((fast(xq).argmax(1) == y).float().mean().item())
for t in range(5): evaluate()
