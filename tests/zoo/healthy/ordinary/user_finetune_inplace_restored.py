"""Per-user fine-tuning in place (p -= lr * p.grad) from a stored start; single-file evaluation."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(19)
torch.set_num_threads(1)

net = nn.Sequential(nn.Embedding(20, 12), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 2))
stored = [p.detach().clone() for p in net.parameters()]
for user in range(6):
    liked = torch.randn(20)
    items = torch.randint(0, 20, (60, 3))
    label = (liked[items].sum(1) > 0).long()
    curve = []
    for _ in range(12):
        for p in net.parameters():
            p.grad = None
        loss = F.cross_entropy(net(items[:40]), label[:40])
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.2 * p.grad
        curve.append(loss.item())
    with torch.no_grad():
        accuracy = (net(items[40:]).argmax(1) == label[40:]).float().mean().item()
        for p, s in zip(net.parameters(), stored):
            p.copy_(s)
    print(f"user {user}: {curve[0]:.3f} -> {curve[-1]:.3f} accuracy {accuracy:.2f}")
