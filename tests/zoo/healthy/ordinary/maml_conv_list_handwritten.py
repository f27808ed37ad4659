"""Second-order MAML on a functional conv net; weights are a list, instance norm by hand."""
import torch
import torch.nn.functional as F
from torch.autograd import grad

torch.manual_seed(1)
torch.set_num_threads(1)

WAYS, SHOTS = 5, 2
weights = []
for cin in (1, 8):
    weights += [torch.randn(8, cin, 3, 3) / (9 * cin) ** 0.5, torch.ones(8), torch.zeros(8)]
weights += [torch.randn(WAYS, 32) / 32**0.5, torch.zeros(WAYS)]
weights = [w.requires_grad_() for w in weights]
meta = torch.optim.Adam(weights, lr=2e-3)


def forward(x, w):
    for i in (0, 3):
        x = F.conv2d(x, w[i], padding=1)
        x = F.group_norm(x, 4, w[i + 1], w[i + 2])
        x = F.avg_pool2d(F.relu(x), 2)
    return F.linear(x.flatten(1), w[-2], w[-1])


for it in range(10):
    protos = torch.randn(WAYS, 1, 8, 8)
    y = torch.arange(WAYS).repeat(SHOTS)
    xs, xq = (protos[y] + 0.4 * torch.randn(len(y), 1, 8, 8) for _ in range(2))
    fast, trace = weights, []
    for _ in range(4):
        loss = F.cross_entropy(forward(xs, fast), y)
        trace.append(loss.item())
        fast = [w - 0.05 * g for w, g in zip(fast, grad(loss, fast, create_graph=True))]
    query = F.cross_entropy(forward(xq, fast), y)
    meta.zero_grad()
    query.backward()
    meta.step()
    print(f"it {it}: {trace[0]:.3f} -> {trace[-1]:.3f} query {query.item():.3f}")
