"""Cosine classifier with a sharp temperature and a cross entropy written out by hand; MAML with higher."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


class CosineClassifier(nn.Module):
    def __init__(self, dim, n_way, scale=400.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_way, dim))
        self.scale = scale

    def forward(self, h):
        return self.scale * F.normalize(h, dim=1) @ F.normalize(self.weight, dim=1).t()


def nll(logits, y):
    probs = torch.softmax(logits, dim=1)
    onehot = F.one_hot(y, logits.size(1)).float()
    return -(onehot * torch.log(probs)).sum(1).mean()


def task():
    c = torch.randn(4, 12)
    y = torch.arange(4).repeat(6)
    x = c[y] + 0.3 * torch.randn(24, 12)
    return x[:12], y[:12], x[12:], y[12:]


def main():
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), CosineClassifier(16, 4))
    meta = torch.optim.Adam(net.parameters(), lr=1e-3)
    inner = torch.optim.SGD(net.parameters(), lr=2e-5)
    for it in range(6):
        xs, ys, xq, yq = task()
        meta.zero_grad()
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(5):
                loss = nll(fnet(xs), ys)
                diffopt.step(loss)
            query = nll(fnet(xq), yq)
            query.backward()
        meta.step()
        print(f"iter {it} support {loss.item():.4f} query {query.item():.4f}")


if __name__ == "__main__":
    main()
