"""TorchOpt MetaSGD on a compiled sinusoid regressor."""
import torch
import torch.nn.functional as F
import torchopt
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
model.compile(backend="eager")
inner = torchopt.MetaSGD(model, lr=0.05)
outer = torch.optim.Adam(model.parameters(), lr=2e-3)

for it in range(8):
    net_state = torchopt.extract_state_dict(model, by="reference")
    opt_state = torchopt.extract_state_dict(inner, by="reference")
    amp, phase = 0.5 + torch.rand(1), 3.14 * torch.rand(1)
    x = torch.rand(20, 1) * 4 - 2
    y = amp * torch.sin(x + phase)
    trace = []
    for _ in range(4):
        loss = F.mse_loss(model(x[:10]), y[:10])
        inner.step(loss)
        trace.append(round(loss.item(), 4))
    query = F.mse_loss(model(x[10:]), y[10:])
    outer.zero_grad()
    query.backward()
    torchopt.recover_state_dict(model, net_state)
    torchopt.recover_state_dict(inner, opt_state)
    outer.step()
    print(f"iter {it} inner {trace} query {query.item():.4f}")
