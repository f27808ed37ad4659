"""Few-shot evaluation with higher (no meta-gradient needed), with a checkpointed encoder."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from higher import innerloop_ctx
from torch.utils.checkpoint import checkpoint

torch.manual_seed(7)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, ways=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3))
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.Linear(12 * 16, ways)

    def forward(self, x):
        if torch.is_grad_enabled():
            x = checkpoint(self.encoder, x, use_reentrant=False)
        else:
            x = self.encoder(x)
        return self.out(F.relu(self.norm(x)).flatten(1))


net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.03)
accs = []
for t in range(6):
    protos = torch.randn(3, 1, 8, 8)
    y = torch.arange(3).repeat(10)
    x = protos[y] + 0.8 * torch.randn(30, 1, 8, 8)
    with innerloop_ctx(net, opt, track_higher_grads=False) as (fnet, diffopt):
        for _ in range(5):
            loss = F.cross_entropy(fnet(x[:15]), y[:15])
            diffopt.step(loss)
        with torch.no_grad():
            acc = (fnet(x[15:]).argmax(1) == y[15:]).float().mean().item()
    accs.append(acc)
    print(f"task {t} loss {loss.item():.3f} acc {acc:.2f}")
print("mean", sum(accs) / len(accs))
