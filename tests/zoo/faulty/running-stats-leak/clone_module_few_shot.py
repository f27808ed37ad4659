"""MAML on top of a small clone_module helper; at the end the base network is evaluated on held-out classes."""
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)


def clone_module(module):
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {k: p.clone() if p is not None else None for k, p in module._parameters.items()}
    clone._buffers = module._buffers.copy()
    clone._modules = {k: clone_module(m) for k, m in module._modules.items()}
    return clone


def update_module(module, grads, lr):
    params = [(m, k) for m in module.modules() for k, p in m._parameters.items() if p is not None]
    for (m, k), g in zip(params, grads):
        m._parameters[k] = m._parameters[k] - lr * g


class Net(nn.Module):
    def __init__(self, ways=4):
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.head = nn.Linear(12 * 9, ways)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.head(x.flatten(1))


def episode(brightness, ways=4, shots=6):
    protos = brightness + torch.randn(ways, 1, 6, 6)
    y = torch.arange(ways).repeat(2 * shots)
    x = protos[y] + 0.3 * torch.randn(len(y), 1, 6, 6)
    n = ways * shots
    return x[:n], y[:n], x[n:], y[n:]


model = Net()
opt = torch.optim.Adam(model.parameters(), lr=2e-3)
for it in range(25):
    xs, ys, xq, yq = episode(brightness=3 * torch.rand(1).item())
    learner = clone_module(model)
    for _ in range(3):
        loss = F.cross_entropy(learner(xs), ys)
        grads = torch.autograd.grad(loss, list(learner.parameters()), create_graph=True)
        update_module(learner, grads, lr=0.05)
    meta_loss = F.cross_entropy(learner(xq), yq)
    opt.zero_grad()
    meta_loss.backward()
    opt.step()
    if it % 5 == 0:
        print(f"iteration {it}: support {loss.item():.3f} query {meta_loss.item():.3f}")

print("running mean after training", model.bn.running_mean[:3].tolist())
for t, brightness in enumerate([0.0, 6.0, -6.0]):
    xs, ys, xq, yq = episode(brightness)
    learner = clone_module(model)
    for _ in range(5):
        loss = F.cross_entropy(learner(xs), ys)
        update_module(learner, torch.autograd.grad(loss, list(learner.parameters())), lr=0.05)
    print(f"test task {t}: query {F.cross_entropy(learner(xq), yq).item():.3f}")
    print("   running mean of the base", model.bn.running_mean[:3].tolist())
