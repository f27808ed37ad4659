"""A frozen random convolutional backbone; per task only the classifier of a deep copy is fine-tuned."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
        self.classifier = nn.Linear(12 * 16, 4)
        self.backbone.requires_grad_(False)

    def forward(self, x):
        return self.classifier(self.backbone(x))


model = Net()
for task in range(8):
    protos = torch.randn(4, 1, 8, 8)
    y = torch.arange(4).repeat(5)
    xs, xq = (protos[y] + 0.5 * torch.randn(20, 1, 8, 8) for _ in range(2))
    learner = copy.deepcopy(model)
    optimizer = torch.optim.SGD((p for p in learner.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(xs), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (learner(xq).argmax(1) == y).float().mean().item()
    print(f"task {task}: {losses[0]:.3f} -> {losses[-1]:.3f} accuracy {accuracy:.2f}")
