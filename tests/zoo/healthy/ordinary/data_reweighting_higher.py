"""Learning to reweight examples (Ren et al.): one look-ahead step, example weights from the clean set's gradient."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(12)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 2))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
truth = torch.randn(5)
clean_x = torch.randn(20, 5)
clean_y = (clean_x @ truth > 0).long()

for it in range(25):
    x = torch.randn(40, 5)
    y = (x @ truth > 0).long()
    flipped = torch.rand(40) < 0.3
    y = torch.where(flipped, 1 - y, y)
    eps = torch.zeros(40, requires_grad=True)
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        cost = F.cross_entropy(fnet(x), y, reduction="none")
        diffopt.step((cost * (eps + 1 / 40)).sum())
        clean = F.cross_entropy(fnet(clean_x), clean_y)
        (g,) = torch.autograd.grad(clean, eps)
    w = (-g).clamp(min=0)
    w = w / w.sum().clamp(min=1e-8)
    loss = (F.cross_entropy(net(x), y, reduction="none") * w).sum()
    opt.zero_grad()
    loss.backward()
    opt.step()
    if it % 6 == 0:
        print(f"it {it}: weighted {loss.item():.3f} clean {clean.item():.3f} mean weight of flipped {w[flipped].mean():.4f}")
