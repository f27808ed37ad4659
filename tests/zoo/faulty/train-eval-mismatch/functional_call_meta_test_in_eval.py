"""Meta-learning with torch.func in train mode; the net also learns a joint task, and is put in eval for meta-testing."""
import torch
import torch.nn as nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

torch.manual_seed(2)
torch.set_num_threads(1)


class Encoder(nn.Module):
    def __init__(self, n_out):
        super().__init__()
        self.fc1 = nn.Linear(10, 32)
        self.bn1 = nn.BatchNorm1d(32)
        self.fc2 = nn.Linear(32, 32)
        self.bn2 = nn.BatchNorm1d(32)
        self.out = nn.Linear(32, n_out)

    def forward(self, x):
        x = torch.relu(self.bn1(self.fc1(x)))
        x = torch.relu(self.bn2(self.fc2(x)))
        return self.out(x)


CENTERS = torch.randn(12, 10)


def sample(labels):
    return CENTERS[labels] + 0.6 * torch.randn(len(labels), 10)


def adapt(net, x, y, steps, create_graph):
    params = dict(net.named_parameters())
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    for _ in range(steps):
        loss = cross_entropy(functional_call(net, (params, buffers), (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
        params = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads)}
    return params, buffers, loss.item()


def episode():
    cls = torch.randperm(12)[:4]
    y = torch.arange(4).repeat(4)
    return sample(cls[y]), y, sample(cls[y]), y


net = Encoder(12)
opt = torch.optim.Adam(net.parameters(), lr=3e-3)
for it in range(40):
    opt.zero_grad()
    xs, ys, xq, yq = episode()
    params, buffers, s = adapt(net, xs, ys, 3, create_graph=True)
    query = cross_entropy(functional_call(net, (params, buffers), (xq,)), yq)
    labels = torch.randint(0, 12, (64,))
    (query + cross_entropy(net(sample(labels)), labels)).backward()
    opt.step()
    if it % 10 == 9:
        print(f"iter {it}: support {s:.3f} query {query.item():.3f}")

net.eval()
for t in range(5):
    xs, ys, xq, yq = episode()
    params, buffers, s = adapt(net, xs, ys, 3, create_graph=False)
    with torch.no_grad():
        logits = functional_call(net, (params, buffers), (xq,))
    print(f"test {t}: support {s:.3f} query {cross_entropy(logits, yq).item():.3f}")
