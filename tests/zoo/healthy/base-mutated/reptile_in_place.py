"""Reptile by hand: adapt in place, then move from the old weights towards the adapted ones."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
inner_lr, epsilon = 0.02, 0.3

for it in range(12):
    amp, phase = 1 + torch.rand(1), 3.14 * torch.rand(1)
    x = 6 * torch.rand(20, 1) - 3
    y = amp * torch.sin(x + phase)
    old = [p.detach().clone() for p in net.parameters()]
    losses = []
    for _ in range(8):
        loss = F.mse_loss(net(x), y)
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= inner_lr * p.grad
        losses.append(loss.item())
    with torch.no_grad():
        for p, o in zip(net.parameters(), old):
            p.copy_(o + epsilon * (p - o))
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f}")
