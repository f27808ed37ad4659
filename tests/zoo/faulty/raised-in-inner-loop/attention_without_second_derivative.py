"""Second-order MAML on a transformer-like block that uses F.scaled_dot_product_attention."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

torch.manual_seed(2)
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(4, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, 3)

    def forward(self, x):
        h = self.embed(x)
        n, t, d = h.shape
        q, k, v = self.qkv(h).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        return self.out(h.mean(1))


model = Block()
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)
for it in range(5):
    centres = torch.randn(3, 1, 4)
    y = torch.arange(3).repeat(4)
    xs, xq = (centres[y] + 0.5 * torch.randn(12, 6, 4) for _ in range(2))
    fast = dict(model.named_parameters())
    for _ in range(3):
        loss = F.cross_entropy(functional_call(model, fast, (xs,)), y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), grads)}
        print(f"it {it} support {loss.item():.4f}")
    query = F.cross_entropy(functional_call(model, fast, (xq,)), y)
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
