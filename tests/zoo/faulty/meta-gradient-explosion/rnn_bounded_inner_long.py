"""MAML on a saturating RNN readout with a long inner loop through torch.func; losses are bounded by tanh."""
import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(2)
torch.set_num_threads(1)


class Recurrent(nn.Module):
    def __init__(self, hidden=12):
        super().__init__()
        self.cell = nn.RNNCell(2, hidden)
        self.readout = nn.Linear(hidden, 1)
        nn.init.orthogonal_(self.cell.weight_hh, gain=1.6)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 12)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return torch.tanh(self.readout(h))


model = Recurrent()
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)

for it in range(4):
    x = torch.randn(80, 6, 2)
    y = torch.sign(x[:, 0, :1] * x[:, 1, 1:])
    fast = dict(model.named_parameters())
    trace = []
    for _ in range(40):
        loss = (functional_call(model, fast, (x[:60],)) - y[:60]).pow(2).mean()
        trace.append(loss.item())
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: v - 0.7 * g for (k, v), g in zip(fast.items(), grads)}
    query = (functional_call(model, fast, (x[60:],)) - y[60:]).pow(2).mean()
    meta_opt.zero_grad()
    query.backward()
    size = sum(p.grad.pow(2).sum() for p in model.parameters()).sqrt().item()
    meta_opt.step()
    print(f"it {it}: support {trace[0]:.3f} {trace[10]:.3f} {trace[-1]:.3f} query {query.item():.3f} |meta grad| {size:.3g}")
