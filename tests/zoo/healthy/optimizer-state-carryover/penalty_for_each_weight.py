"""A penalty for each weight by implicit gradients: its own optimizer goes on, as it should."""

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
x, y = torch.randn(30, 6), torch.randn(30)
penalty = torch.full((6,), -3.0, requires_grad=True)
outer = torch.optim.RMSprop([penalty], lr=5e-2)


def objective(w):
    return F.mse_loss(x @ w, y) + (penalty.exp() * w**2).sum()


for iteration in range(6):
    weight = torch.zeros(6, requires_grad=True)
    inner = torch.optim.SGD([weight], lr=0.1)
    for _ in range(10):
        inner.zero_grad()
        objective(weight).backward()
        inner.step()
    validation = F.mse_loss(x[:9] @ weight, y[:9])
    (direction,) = torch.autograd.grad(validation, weight)
    (slope,) = torch.autograd.grad(objective(weight), weight, create_graph=True)
    (hypergradient,) = torch.autograd.grad(slope, penalty, -0.1 * direction)
    outer.zero_grad()
    penalty.grad = hypergradient
    outer.step()
    print(iteration, validation.item())
