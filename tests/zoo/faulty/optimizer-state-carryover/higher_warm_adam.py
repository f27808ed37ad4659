"""Pre-trains a net with Adam, then meta-trains it with higher using that same optimizer object for the inner loop."""
import higher
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(1)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1))
inner_opt = torch.optim.Adam(net.parameters(), lr=5e-3)


def task(n=16):
    w = torch.randn(3, 1)
    x = torch.randn(2 * n, 3)
    y = torch.tanh(x @ w) + 0.5
    return x[:n], y[:n], x[n:], y[n:]


print("pre-training")
for _ in range(30):
    x, y, _, _ = task()
    inner_opt.zero_grad()
    F.mse_loss(net(x), y).backward()
    inner_opt.step()

meta_opt = torch.optim.SGD(net.parameters(), lr=1e-2)
for it in range(8):
    xs, ys, xq, yq = task()
    meta_opt.zero_grad()
    with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
        first = None
        for _ in range(5):
            loss = F.mse_loss(fnet(xs), ys)
            first = first or loss.item()
            diffopt.step(loss)
        query = F.mse_loss(fnet(xq), yq)
        query.backward()
    meta_opt.step()
    print(f"it {it}: support {first:.3f} -> {loss.item():.3f} query {query.item():.3f}")
