"""Per-step learned inner learning rates (as in MAML++), layer-norm MLP, functional_call."""
import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(2)
torch.set_num_threads(1)

STEPS = 4
model = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 3))
step_sizes = nn.ParameterList([nn.Parameter(torch.tensor(0.05)) for _ in range(STEPS)])
optimizer = torch.optim.Adam([{"params": model.parameters()}, {"params": step_sizes, "lr": 0.05}], lr=1e-3)
ce = nn.CrossEntropyLoss()


def task(flip=0.5):
    centres = torch.randn(3, 6)
    y = torch.arange(3).repeat(8)
    x = centres[y] + 0.5 * torch.randn(24, 6)
    support_y = y[:12].clone()
    noisy = torch.rand(12) < flip
    support_y[noisy] = torch.randint(0, 3, (int(noisy.sum()),))
    return x[:12], support_y.roll(1), x[12:], y[12:]


for it in range(15):
    xs, ys, xq, yq = task()
    fast = dict(model.named_parameters())
    trace = []
    for lr in step_sizes:
        loss = ce(functional_call(model, fast, (xs,)), ys)
        trace.append(round(loss.item(), 3))
        grads = torch.autograd.grad(loss, tuple(fast.values()), create_graph=True)
        fast = {name: w - lr * g for (name, w), g in zip(fast.items(), grads)}
    query = ce(functional_call(model, fast, (xq,)), yq)
    optimizer.zero_grad()
    query.backward()
    optimizer.step()
    print(it, "next lrs", [round(s.item(), 3) for s in step_sizes], "support", trace, "query", round(query.item(), 3))
