"""Few-shot classification with a functional conv net; fast weights are a plain list, inner momentum by hand."""
import torch
import torch.nn.functional as F
from torch.autograd import grad

torch.manual_seed(1)
torch.set_num_threads(1)

WAYS, SHOTS, QUERIES = 5, 3, 5
inner_lr = 3.0
inner_steps = 10
mu = 0.9


def init(channels=8):
    shapes = [(channels, 1, 3, 3), (channels,), (channels, channels, 3, 3), (channels,), (WAYS, channels * 4), (WAYS,)]
    weights = []
    for shape in shapes:
        w = torch.zeros(shape)
        if len(shape) > 1:
            torch.nn.init.xavier_normal_(w)
        weights.append(w.requires_grad_())
    return weights


def net(x, w):
    x = F.avg_pool2d(F.softplus(F.conv2d(x, w[0], w[1], padding=1)), 2)
    x = F.avg_pool2d(F.softplus(F.conv2d(x, w[2], w[3], padding=1)), 2)
    return F.linear(x.flatten(1), w[4], w[5])


def episode():
    prototypes = torch.randn(WAYS, 1, 8, 8)

    def draw(n):
        labels = torch.arange(WAYS).repeat_interleave(n)
        return prototypes[labels] + 0.3 * torch.randn(WAYS * n, 1, 8, 8), F.one_hot(labels, WAYS).float()

    return draw(SHOTS), draw(QUERIES)


weights = init()
outer = torch.optim.Adam(weights, lr=1e-3)

for epoch in range(4):
    outer.zero_grad()
    losses = []
    for task in range(2):
        (xs, ys), (xq, yq) = episode()
        fast = weights
        velocity = [torch.zeros_like(w) for w in weights]
        for step in range(inner_steps):
            loss = F.mse_loss(net(xs, fast), ys)
            losses.append(loss.item())
            gs = grad(loss, fast, create_graph=True)
            velocity = [mu * v + g for v, g in zip(velocity, gs)]
            fast = [w - inner_lr * v for w, v in zip(fast, velocity)]
        query = F.mse_loss(net(xq, fast), yq)
        query.backward()
        print(f"epoch {epoch} task {task} support {losses[0]:.3f} -> {losses[-1]:.3g} query {query.item():.3g}")
    outer.step()
