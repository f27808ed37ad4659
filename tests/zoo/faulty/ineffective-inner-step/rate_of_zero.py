"""MAML by hand whose inner rate comes out of a division of whole numbers: it is 0."""
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
WAYS, SHOTS, ANNEAL = 3, 5, 10
inner_lr = 1 // ANNEAL

net = nn.Linear(8, WAYS)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
y = torch.arange(WAYS).repeat_interleave(SHOTS)
for episode in range(20):
    centres = torch.randn(WAYS, 8)
    support, query = (centres[y] + 0.5 * torch.randn(len(y), 8) for _ in range(2))
    fast = list(net.parameters())
    for _ in range(4):
        loss = F.cross_entropy(F.linear(support, *fast), y)
        gradients = torch.autograd.grad(loss, fast, create_graph=True)
        fast = [w - inner_lr * g for w, g in zip(fast, gradients)]
    outer = F.cross_entropy(F.linear(query, *fast), y)
    optimizer.zero_grad()
    outer.backward()
    optimizer.step()
print(loss.item(), outer.item())
