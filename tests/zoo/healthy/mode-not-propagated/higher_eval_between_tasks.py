"""higher MAML with dropout; the base is switched to eval for a look at its prior, and back before the next patch."""
import higher
import torch
from torch import nn
from torch.nn.functional import cross_entropy

torch.set_num_threads(1)
torch.manual_seed(6)
net = nn.Sequential(nn.Linear(10, 48), nn.Tanh(), nn.Dropout(0.1), nn.Linear(48, 3))
outer = torch.optim.Adam(net.parameters(), lr=2e-3)
inner = torch.optim.SGD(net.parameters(), lr=0.2)
val_x = torch.randn(30, 10)


def task():
    proj = torch.randn(10, 3)
    x = torch.randn(60, 10)
    y = (x @ proj).argmax(1)
    return x[:30], y[:30], x[30:], y[30:]


for epoch in range(10):
    net.eval()
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=net(val_x)).entropy().mean()
    net.train()
    xs, ys, xq, yq = task()
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
        net.train()
        for k in range(5):
            loss = cross_entropy(fnet(xs), ys)
            diffopt.step(loss)
        query = cross_entropy(fnet(xq), yq)
        outer.zero_grad()
        query.backward()
    outer.step()
    print(f"epoch {epoch} prior entropy {entropy:.2f} support {loss.item():.3f} query {query.item():.3f}")
