"""State kept by reference, updates by hand: every load puts back what is there."""
import torch
from torch import nn
torch.set_num_threads(1); torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
saved = net.state_dict()
for t in range(8):
    net.load_state_dict(saved)
    w = torch.randn(4, 1); x = torch.randn(20, 4); y = x @ w
    for _ in range(4):
        net.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        with torch.no_grad():
            for p in net.parameters(): p -= .02 * p.grad
