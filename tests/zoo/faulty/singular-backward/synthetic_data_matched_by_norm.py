"""Learns a small data set whose gradients match the real ones; the distance has a square root at zero."""
import torch

torch.manual_seed(7)
torch.set_num_threads(1)

x, y = torch.randn(64, 6), torch.randn(64, 3)
used = torch.tensor([1.0, 1.0, 0.0])  # the third output is not trained: its gradients are exactly 0
small = torch.randn(6, 6, requires_grad=True)
labels = torch.randn(6, 3)
sgd = torch.optim.SGD([small], lr=0.1)


def loss_of(weight, data, target):
    return ((data @ weight - target) * used).pow(2).mean()


for restart in range(5):
    weight = (0.3 * torch.randn(6, 3)).requires_grad_()
    for _ in range(4):
        (real,) = torch.autograd.grad(loss_of(weight, x, y), weight)
        (made,) = torch.autograd.grad(loss_of(weight, small, labels), weight, create_graph=True)
        distance = (made - real).pow(2).sum(0).sqrt().sum()
        sgd.zero_grad()
        distance.backward()
        sgd.step()
        (slope,) = torch.autograd.grad(loss_of(weight, small.detach(), labels), weight)
        weight = (weight - 0.1 * slope).detach().requires_grad_()
    print(f"restart {restart}: distance {distance.item():.4f}")
