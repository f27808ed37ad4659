"""A rate learned through truncated unrolls: training goes on over the outer steps."""
import torch
torch.manual_seed(0); torch.set_num_threads(1)
lr = torch.tensor(.05, requires_grad=True); mo = torch.optim.SGD([lr], lr=1e-4)
for ep in range(8):
    W, y = torch.randn(10, 10) / 3, torch.randn(10)
    theta = torch.zeros(10, requires_grad=True)
    for seg in range(4):
        for k in range(5):
            g, = torch.autograd.grad(((W @ theta - y) ** 2).sum(), theta)
            theta = theta - lr * g
        mo.zero_grad(); ((W @ theta - y) ** 2).sum().backward(); mo.step()
        theta = theta.detach().requires_grad_()
    print(ep, lr.item())
