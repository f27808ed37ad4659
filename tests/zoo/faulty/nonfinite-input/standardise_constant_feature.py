"""Tabular few-shot tasks, standardised per task before the (hand-written) inner loop."""
import torch
import torch.nn.functional as F

torch.manual_seed(2)
torch.set_num_threads(1)

w1 = (0.3 * torch.randn(20, 6)).requires_grad_()
b1 = torch.zeros(20, requires_grad=True)
w2 = (0.3 * torch.randn(3, 20)).requires_grad_()
b2 = torch.zeros(3, requires_grad=True)
theta = [w1, b1, w2, b2]
outer = torch.optim.Adam(theta, lr=3e-3)


def forward(x, p):
    return F.linear(F.elu(F.linear(x, p[0], p[1])), p[2], p[3])


def standardise(x):
    return (x - x.mean(0)) / x.std(0)


def load_task(i):
    centers = torch.randn(3, 6)
    y = torch.arange(3).repeat(10)
    x = centers[y] + 0.4 * torch.randn(30, 6)
    if i == 5:
        x[:, 4] = 1.0  # an indicator column, the same for every row of this table
    return standardise(x), y


for i in range(8):
    x, y = load_task(i)
    fast = theta
    for k in range(4):
        loss = F.cross_entropy(forward(x[:15], fast), y[:15])
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        fast = [p - 0.2 * g for p, g in zip(fast, grads)]
    query = F.cross_entropy(forward(x[15:], fast), y[15:])
    outer.zero_grad()
    query.backward()
    outer.step()
    print(f"table {i}: support {loss.item():.3f} query {query.item():.3f}")
