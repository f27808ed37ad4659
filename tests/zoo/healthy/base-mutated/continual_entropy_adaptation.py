"""Continual test-time adaptation: one model follows a slowly drifting stream, by design without any reset."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
centres = 0.8 * torch.randn(3, 6)
source = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(80):
    y = torch.randint(0, 3, (48,))
    source.zero_grad()
    F.cross_entropy(model(centres[y] + 0.5 * torch.randn(48, 6)), y).backward()
    source.step()

norm = model[1]
model.requires_grad_(False)
norm.requires_grad_(True)
optimizer = torch.optim.SGD(norm.parameters(), lr=0.5)
drift = 0.05 * torch.randn(6)

for batch in range(12):
    y = torch.randint(0, 3, (48,))
    x = centres[y] + 0.5 * torch.randn(48, 6) + batch * drift
    entropies = []
    for _ in range(3):
        logits = model(x)
        log_p = logits.log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        optimizer.zero_grad()
        entropy.backward()
        optimizer.step()
        entropies.append(entropy.item())
    accuracy = (logits.argmax(1) == y).float().mean().item()
    print(f"batch {batch}: entropy {entropies[0]:.4f} -> {entropies[-1]:.4f} accuracy {accuracy:.2f}")
