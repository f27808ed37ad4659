"""MAML with torch.func.grad on an attention classifier; the adapted parameters are used for the query."""
import torch
from torch import nn
from torch.func import functional_call, grad_and_value

torch.manual_seed(1)
torch.set_num_threads(1)


class AttnClassifier(nn.Module):
    def __init__(self, dim=12, classes=3):
        super().__init__()
        self.inp = nn.Linear(4, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, classes)

    def forward(self, x):
        h = self.inp(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        return self.out(h.mean(1))


model = AttnClassifier()
opt = torch.optim.Adam(model.parameters(), lr=2e-3)
ce = nn.CrossEntropyLoss()


def support_loss(p, x, y):
    return ce(functional_call(model, p, (x,)), y)


for it in range(8):
    centres = torch.randn(3, 1, 4)
    y = torch.arange(3).repeat(6)
    x = centres[y] + 0.6 * torch.randn(18, 5, 4)
    xq = centres[y] + 0.6 * torch.randn(18, 5, 4)
    params = dict(model.named_parameters())
    values = []
    for _ in range(4):
        grads, value = grad_and_value(support_loss)(params, x, y)
        adapted = {k: params[k] - 0.1 * grads[k] for k in params}
        values.append(f"{value.item():.4f}")
    query = ce(functional_call(model, adapted, (xq,)), y)
    opt.zero_grad()
    query.backward()
    opt.step()
    print("it", it, "support", *values, "query", round(query.item(), 4))
