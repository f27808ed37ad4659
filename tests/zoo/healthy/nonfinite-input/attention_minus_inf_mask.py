"""A small causal attention model; scores of future positions are set to -inf before the softmax."""
import math

import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(6)
torch.set_num_threads(1)


class CausalAttention(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.embed = nn.Linear(2, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 1)

    def forward(self, x):
        h = self.embed(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        return self.out(h + scores.softmax(-1) @ v)


net = CausalAttention()
opt = torch.optim.Adam(net.parameters(), lr=3e-3)
for it in range(12):
    mix = torch.randn(2, 1)
    x = torch.randn(16, 6, 2)
    y = torch.tanh(x.cumsum(1) @ mix / 2)
    params = dict(net.named_parameters())
    for _ in range(3):
        loss = (functional_call(net, params, (x[:8],)) - y[:8]).pow(2).mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads)}
    query = (functional_call(net, params, (x[8:],)) - y[8:]).pow(2).mean()
    opt.zero_grad()
    query.backward()
    opt.step()
    print(f"{it} support {loss.item():.4f} query {query.item():.4f}")
