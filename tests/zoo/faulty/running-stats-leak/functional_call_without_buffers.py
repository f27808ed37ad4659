"""functional_call inner loop for domain adaptation; the source model's own accuracy is tracked along the way."""
import torch
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)
torch.manual_seed(4)

model = nn.Sequential(
    nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
)
loss_fn = nn.CrossEntropyLoss()
centers = 2 * torch.randn(3, 10)


def domain(shift, n=48):
    y = torch.randint(0, 3, (n,))
    return centers[y] + torch.randn(n, 10) + shift, y


@torch.no_grad()
def source_accuracy():
    model.eval()
    x, y = domain(0.0, 300)
    acc = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return acc


opt = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(60):
    x, y = domain(0.0)
    opt.zero_grad()
    loss_fn(model(x), y).backward()
    opt.step()
print("source accuracy after pretraining", source_accuracy())

for t in range(5):
    shift = 4.0 * torch.randn(10)
    xs, ys = domain(shift)
    xq, yq = domain(shift)
    fast = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for k in range(6):
        loss = loss_fn(functional_call(model, fast, (xs,)), ys)
        grads = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            name: (p - 0.05 * g).detach().requires_grad_() for (name, p), g in zip(fast.items(), grads)
        }
    with torch.no_grad():
        query = loss_fn(functional_call(model, fast, (xq,)), yq)
    print(f"domain {t}: support {loss.item():.3f} query {query.item():.3f} source accuracy {source_accuracy():.2f}")
