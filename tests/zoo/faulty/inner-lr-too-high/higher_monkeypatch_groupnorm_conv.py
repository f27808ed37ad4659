"""Few-shot image regression (pose angle) with a GroupNorm conv net, higher.monkeypatch and get_diff_optim."""
import torch
from higher import get_diff_optim, monkeypatch
from torch import nn

torch.manual_seed(5)
torch.set_num_threads(1)


def block(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.GroupNorm(4, cout), nn.ReLU(), nn.MaxPool2d(2))


net = nn.Sequential(block(1, 8), block(8, 16), nn.Flatten(), nn.Linear(16 * 9, 2))
opt = torch.optim.Adam(net.parameters(), lr=1e-3)
mse = nn.MSELoss()


def render(n):
    angle = torch.rand(n) * 3.1416
    axis = torch.linspace(-1, 1, 12)
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    bar = torch.exp(-8 * (xx * angle.sin().view(-1, 1, 1) - yy * angle.cos().view(-1, 1, 1)) ** 2)
    target = torch.stack([(2 * angle).sin(), (2 * angle).cos()], 1)
    return bar.unsqueeze(1) + 0.05 * torch.randn(n, 1, 12, 12), target


for it in range(5):
    rotate = torch.linalg.qr(torch.randn(2, 2))[0]
    xs, ys = render(10)
    xq, yq = render(10)
    fast_net = monkeypatch(net, copy_initial_weights=False)
    fast_opt = get_diff_optim(torch.optim.SGD(net.parameters(), lr=0.25), net.parameters(), fmodel=fast_net)
    curve = []
    for _ in range(8):
        loss = mse(fast_net(xs), ys @ rotate)
        fast_opt.step(loss)
        curve.append(loss.item())
    query = mse(fast_net(xq), yq @ rotate)
    opt.zero_grad()
    query.backward()
    opt.step()
    print(it, ["%.3g" % c for c in curve], "query %.3g" % query.item())
