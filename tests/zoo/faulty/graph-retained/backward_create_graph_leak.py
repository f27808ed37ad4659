"""Hand-written second-order MAML with loss.backward(create_graph=True) on cloned leaf weights for every task."""
import torch
import torch.nn.functional as F

torch.manual_seed(2)
torch.set_num_threads(1)

sizes = [4, 48, 48, 1]


def fresh_like(params):
    return [p.detach().clone().requires_grad_() for p in params]


def net(x, p):
    for i in range(0, len(p) - 2, 2):
        x = torch.tanh(F.linear(x, p[i], p[i + 1]))
    return F.linear(x, p[-2], p[-1])


theta = []
for a, b in zip(sizes, sizes[1:]):
    theta += [torch.randn(b, a) / a**0.5, torch.zeros(b)]

for it in range(40):
    x = torch.randn(40, 4)
    y = torch.tanh(x @ torch.randn(4, 1))
    leaves = fresh_like(theta)
    weights = leaves
    for k in range(3):
        loss = F.mse_loss(net(x[:20], weights), y[:20])
        if k == 0:
            loss.backward(create_graph=True)
            weights = [w - 0.05 * w.grad for w in leaves]
        else:
            grads = torch.autograd.grad(loss, weights, create_graph=True)
            weights = [w - 0.05 * g for w, g in zip(weights, grads)]
    query = F.mse_loss(net(x[20:], weights), y[20:])
    meta_grads = torch.autograd.grad(query, leaves)
    theta = [t - 0.02 * g for t, g in zip(theta, meta_grads)]
    if it % 8 == 7:
        print(f"it {it}: support {loss.item():.4f} query {query.item():.4f}")
