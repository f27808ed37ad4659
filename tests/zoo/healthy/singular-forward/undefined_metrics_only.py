"""MAML with hand-written steps; the logged metrics (perplexity, precision) may be inf or NaN, the losses never are."""
import torch
import torch.nn.functional as F

torch.manual_seed(4)
torch.set_num_threads(1)
theta = [(0.3 * torch.randn(24, 10)), torch.zeros(24), 0.3 * torch.randn(5, 24), torch.zeros(5)]
theta = [t.requires_grad_() for t in theta]
opt = torch.optim.Adam(theta, lr=2e-3)


def f(x, p):
    return F.linear(torch.tanh(F.linear(x, p[0], p[1])), p[2], p[3])


for it in range(10):
    c = torch.randn(5, 10)
    y = torch.arange(5).repeat(4)
    x = c[y] + 0.3 * torch.randn(20, 10)
    fast = theta
    for _ in range(4):
        support = F.cross_entropy(f(x[:10], fast), y[:10])
        g = torch.autograd.grad(support, fast, create_graph=True)
        fast = [p - 0.3 * d for p, d in zip(fast, g)]
    logits = f(x[10:], fast)
    query = F.cross_entropy(logits, y[10:])
    opt.zero_grad()
    query.backward()
    opt.step()
    with torch.no_grad():
        pred = logits.argmax(1)
        hit = ((pred == 0) & (y[10:] == 0)).sum()
        precision = hit / ((pred == 0) & (x[10:, 0] > 1)).sum()
        perplexity = (200 * query).exp()
        rarest = torch.log((pred == 4).float().mean())
    print(f"{it} support {support.item():.3f} query {query.item():.3f} precision {precision:.2f} "
          f"ppl {perplexity:.2g} rarest {rarest:.2f}")
