"""higher with Adam as the inner optimizer on a net some of whose ReLU units never fire."""
import higher
import torch
from torch import nn

torch.manual_seed(5)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
with torch.no_grad():
    net[0].bias[:4] = -20.0
inner = torch.optim.Adam(net.parameters(), lr=3e-3)
outer = torch.optim.Adam(net.parameters(), lr=1e-3)
mse = nn.MSELoss()

for it in range(10):
    w = torch.randn(2, 1)
    x = torch.randn(30, 2)
    y = torch.tanh(x @ w)
    outer.zero_grad()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        trace = []
        for _ in range(4):
            loss = mse(fnet(x[:15]), y[:15])
            diffopt.step(loss)
            trace.append(round(loss.item(), 4))
        query = mse(fnet(x[15:]), y[15:])
        query.backward()
    total = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    outer.step()
    print(it, trace, round(query.item(), 4), "meta-gradient", round(total.item(), 4))
