"""Fine-tune copies of a pretrained conv-BN net on new domains and score them."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(9)
torch.set_num_threads(1)


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 9, 5)

    def forward(self, x):
        return self.fc(torch.max_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1))


protos = torch.randn(5, 1, 8, 8)
criterion = nn.CrossEntropyLoss()


def loader(n, tilt=0.0):
    y = torch.randint(0, 5, (n,))
    return protos[y] * (1 + tilt) + 0.8 * torch.randn(n, 1, 8, 8), y


model = SmallCNN()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
model.train()
for i in range(50):
    x, y = loader(40)
    opt.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    opt.step()
print("pretraining", loss.item())

for domain in range(5):
    tilt = 0.3 * torch.randn(1).item()
    model.train()
    learner = copy.deepcopy(model)
    inner_opt = torch.optim.SGD(learner.parameters(), lr=0.02)
    xs, ys = loader(20, tilt)
    for _ in range(5):
        inner_opt.zero_grad()
        loss = criterion(learner(xs), ys)
        loss.backward()
        inner_opt.step()
    model.eval()
    xq, yq = loader(8, tilt)
    with torch.no_grad():
        preds = learner(xq).argmax(1)
    print(f"domain {domain}: support {loss.item():.3f} query accuracy {(preds == yq).float().mean().item():.2f}")
