"""Entropy minimisation on LayerNorm parameters of an attention block, restored after every stream."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(21)
torch.set_num_threads(1)

centres = torch.randn(4, 6, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        h = self.norm(x)
        return self.out((x + self.attention(h, h, h)[0]).mean(1))


net = Block()
optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
for _ in range(60):
    y = torch.randint(0, 4, (32,))
    optimizer.zero_grad()
    F.cross_entropy(net(centres[y] + 0.5 * torch.randn(32, 6, 8)), y).backward()
    optimizer.step()
saved = copy.deepcopy(net.state_dict())
net.requires_grad_(False)
net.norm.requires_grad_(True)
for stream in range(5):
    net.load_state_dict(saved)
    inner = torch.optim.Adam(net.norm.parameters(), lr=1e-3)
    shift = 0.5 * torch.randn(8)
    for _ in range(4):
        y = torch.randint(0, 4, (32,))
        p = net(centres[y] + shift + 0.5 * torch.randn(32, 6, 8)).softmax(1)
        entropy = -(p * (p + 1e-9).log()).sum(1).mean()
        inner.zero_grad()
        entropy.backward()
        inner.step()
    print(stream, entropy.item(), (p.argmax(1) == y).float().mean().item())
