"""MAML with higher on a model compiled for speed."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(1, 40)
        self.fc2 = nn.Linear(40, 40)
        self.fc3 = nn.Linear(40, 1)

    def forward(self, x):
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def sinusoid():
    amp, phase = 0.5 + 2 * torch.rand(1), 3.14 * torch.rand(1)
    x = torch.rand(20, 1) * 4 - 2
    y = amp * torch.sin(x + phase)
    return x[:10], y[:10], x[10:], y[10:]


def main():
    model = MLP()
    model.compile(backend="eager")
    meta_opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    inner_opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for it in range(8):
        xs, ys, xq, yq = sinusoid()
        meta_opt.zero_grad()
        with higher.innerloop_ctx(model, inner_opt, copy_initial_weights=False) as (fmodel, diffopt):
            inner = []
            for _ in range(5):
                loss = F.mse_loss(fmodel(xs), ys)
                diffopt.step(loss)
                inner.append(round(loss.item(), 4))
            query = F.mse_loss(fmodel(xq), yq)
            query.backward()
        meta_opt.step()
        print(f"iter {it} inner {inner} query {query.item():.4f}")


if __name__ == "__main__":
    main()
