"""Few-shot classification with functional_call; the inner gradients are turned into plain tensors for logging."""
import torch
from torch import nn
from torch.func import functional_call

torch.manual_seed(2)
torch.set_num_threads(1)

model = nn.Sequential(nn.Linear(5, 24), nn.LayerNorm(24), nn.SiLU(), nn.Linear(24, 3))
ce = nn.CrossEntropyLoss()
meta_opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for it in range(8):
    centres = torch.randn(3, 5)
    y = torch.arange(3).repeat(6)
    xs, xq = (centres[y] + 0.6 * torch.randn(18, 5) for _ in range(2))
    fast = dict(model.named_parameters())
    norms = []
    for _ in range(4):
        loss = ce(functional_call(model, fast, (xs,)), y)
        grads = [g.detach() for g in torch.autograd.grad(loss, list(fast.values()), create_graph=True)]
        norms.append(round(sum(g.pow(2).sum() for g in grads).sqrt().item(), 3))
        fast = {k: w - 0.1 * g for (k, w), g in zip(fast.items(), grads)}
    query = ce(functional_call(model, fast, (xq,)), y)
    meta_opt.zero_grad()
    query.backward()
    meta_opt.step()
    print(f"it {it}: support {loss.item():.3f} query {query.item():.3f} inner gradient norms {norms}")
