"""Ragged sequences padded with NaN; the mask zeroes the padding before the GRU sees it."""
import torch
import torch.nn as nn
import higher

torch.manual_seed(5)
torch.set_num_threads(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRUCell(2, 20)
        self.out = nn.Linear(20, 1)

    def forward(self, x):
        valid = ~torch.isnan(x).any(-1)
        x = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))
        h = x.new_zeros(x.size(0), 20)
        for t in range(x.size(1)):
            new = self.rnn(x[:, t], h)
            h = torch.where(valid[:, t : t + 1], new, h)
        return self.out(h)


def task(n=20, length=8):
    slope = torch.randn(1)
    x = torch.randn(n, length, 2)
    y = torch.tanh(slope * x[:, :3].mean((1, 2))).unsqueeze(1)
    lengths = torch.randint(3, length + 1, (n,))
    x[torch.arange(length) >= lengths.unsqueeze(1)] = float("nan")
    return x, y


model = Model()
meta = torch.optim.Adam(model.parameters(), lr=3e-3)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
for it in range(10):
    x, y = task()
    meta.zero_grad()
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fnet, diffopt):
        for _ in range(3):
            loss = nn.functional.mse_loss(fnet(x[:10]), y[:10])
            diffopt.step(loss)
        query = nn.functional.mse_loss(fnet(x[10:]), y[10:])
        query.backward()
    meta.step()
    print(it, "support", round(loss.item(), 4), "query", round(query.item(), 4))
