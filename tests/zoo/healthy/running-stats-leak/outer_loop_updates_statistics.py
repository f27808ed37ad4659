"""MAML plus an auxiliary joint classification loss: the base's statistics follow its own forward on the mixed batch."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.set_num_threads(1)
torch.manual_seed(13)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.task_head = nn.Linear(16, 3)
        self.joint_head = nn.Linear(16, 8)

    def forward(self, x):
        h = self.body(x)
        return self.task_head(h), self.joint_head(h)


classes = 1.5 * torch.randn(8, 12)
net = Net()
inner_opt = torch.optim.SGD([*net.body.parameters(), *net.task_head.parameters()], lr=0.1)
opt = torch.optim.Adam(net.parameters(), lr=3e-3)

for it in range(20):
    opt.zero_grad()
    chosen = torch.randperm(8)[:3]
    y = torch.arange(3).repeat(10)
    x = classes[chosen][y] + torch.randn(30, 12)
    with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
        for _ in range(3):
            support = F.cross_entropy(fnet(x[:15])[0], y[:15])
            diffopt.step(support)
        query = F.cross_entropy(fnet(x[15:])[0], y[15:])
        query.backward()
    labels = torch.randint(0, 8, (64,))
    joint = F.cross_entropy(net(classes[labels] + torch.randn(64, 12))[1], labels)
    joint.backward()
    opt.step()
    print(f"{it}: support {support.item():.3f} query {query.item():.3f} joint {joint.item():.3f}")
print("batches tracked by the base:", int(net.body[1].num_batches_tracked))
