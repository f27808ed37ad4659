"""TorchOpt MetaSGD few-shot regression; states are restored between tasks and the net is tested in eval."""
import torch
import torch.nn as nn
import torchopt

torch.set_num_threads(1)
torch.manual_seed(11)

net = nn.Sequential(
    nn.Linear(4, 24, bias=False),
    nn.BatchNorm1d(24),
    nn.ReLU(),
    nn.Linear(24, 24, bias=False),
    nn.BatchNorm1d(24),
    nn.ReLU(),
    nn.Linear(24, 1),
)
inner = torchopt.MetaSGD(net, lr=0.05)
outer = torch.optim.Adam(net.parameters(), lr=2e-3)


def regression_task(n=16):
    coef = torch.randn(4, 1)
    x = torch.rand(2, n, 4) * 50 + 100
    y = torch.sin((x - 125) / 25 @ coef)
    return x, y


def adapt(xs, ys, steps, tag):
    for k in range(steps):
        loss = nn.functional.mse_loss(net(xs), ys)
        inner.step(loss)
        print(f"    {tag} step {k}: {loss.item():.4g}")


net.train()
for epoch in range(8):
    net_state = torchopt.extract_state_dict(net, by="reference", with_buffers=True, detach_buffers=True)
    opt_state = torchopt.extract_state_dict(inner, by="copy")
    x, y = regression_task()
    outer.zero_grad()
    adapt(x[0], y[0], 3, "train")
    q = nn.functional.mse_loss(net(x[1]), y[1])
    q.backward()
    torchopt.recover_state_dict(net, net_state)
    torchopt.recover_state_dict(inner, opt_state)
    outer.step()
    print(f"epoch {epoch} query {q.item():.3f}")

net.eval()
state = torchopt.extract_state_dict(net, by="reference", with_buffers=True, detach_buffers=True)
for t in range(3):
    x, y = regression_task()
    adapt(x[0], y[0], 5, "test")
    with torch.no_grad():
        print("test query", nn.functional.mse_loss(net(x[1]), y[1]).item())
    torchopt.recover_state_dict(net, state)
