"""FOMAML: a fresh Adam for every deep copy, attention pooling classifier."""
import copy

import torch
from torch import nn

torch.manual_seed(6)
torch.set_num_threads(1)


class AttentionPool(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 3)

    def forward(self, x):
        h = self.embed(x)
        h = self.norm(h + self.attn(h, h, h, need_weights=False)[0])
        return self.out(h.mean(1))


meta_net = AttentionPool()
meta_opt = torch.optim.Adam(meta_net.parameters(), lr=1e-3)
ce = nn.CrossEntropyLoss()
for it in range(8):
    centres = torch.randn(3, 1, 4)
    y = torch.arange(3).repeat(5)
    xs, xq = (centres[y] + 0.7 * torch.randn(15, 5, 4) for _ in range(2))
    net = copy.deepcopy(meta_net)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        adam.zero_grad()
        loss = ce(net(xs), y)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    adam.zero_grad()
    query = ce(net(xq), y)
    query.backward()
    for p, q in zip(meta_net.parameters(), net.parameters()):
        p.grad = q.grad
    meta_opt.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
