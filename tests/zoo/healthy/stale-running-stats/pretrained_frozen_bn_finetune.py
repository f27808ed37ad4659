"""Pretrain a backbone until its statistics have settled, then fine-tune copies of it with frozen BN."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(1)
torch.set_num_threads(1)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, 3)
        self.bn2 = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean(dim=(2, 3)))


def images(n, protos):
    y = torch.randint(0, 4, (n,))
    x = protos[y] + 0.3 * torch.randn(n, 3, 8, 8)
    return 40.0 * x + 90.0, y


criterion = nn.CrossEntropyLoss()
model = Backbone()
base_protos = torch.randn(4, 3, 8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for i in range(80):
    x, y = images(32, base_protos)
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
print("pretraining loss", round(loss.item(), 3))

model.eval()
for task in range(4):
    protos = base_protos[torch.randperm(4)] + 0.2 * torch.randn(4, 3, 8, 8)
    xs, ys = images(20, protos)
    xq, yq = images(20, protos)
    learner = copy.deepcopy(model)
    inner = torch.optim.SGD(learner.parameters(), lr=0.003)
    for step in range(6):
        inner.zero_grad()
        loss = criterion(learner(xs), ys)
        loss.backward()
        inner.step()
        print(f"task {task} step {step} loss {loss.item():.4g}")
    with torch.no_grad():
        acc = (learner(xq).argmax(1) == yq).float().mean().item()
    print(f"task {task} query accuracy {acc:.2f}")
