"""higher with a centered RMSprop as the inner optimizer, on a ReLU regression net."""
import warnings

import higher
import torch
from torch import nn

warnings.filterwarnings("ignore")
torch.manual_seed(3)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
with torch.no_grad():
    net[0].bias[:4] = -20.0  # left over from an earlier, too eager pretraining
inner = torch.optim.RMSprop(net.parameters(), lr=1e-3, centered=True)
outer = torch.optim.Adam(net.parameters(), lr=1e-3)
mse = nn.MSELoss()

for it in range(5):
    w = torch.randn(2, 1)
    x = torch.randn(30, 2)
    y = torch.tanh(x @ w)
    outer.zero_grad()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        trace = []
        for _ in range(3):
            loss = mse(fnet(x[:15]), y[:15])
            diffopt.step(loss)
            trace.append(round(loss.item(), 4))
        query = mse(fnet(x[15:]), y[15:])
        query.backward()
    outer.step()
    print(it, trace, round(query.item(), 4), "first weight", net[0].weight[10, 0].item())
