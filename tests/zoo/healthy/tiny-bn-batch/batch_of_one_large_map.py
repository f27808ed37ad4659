"""Online adaptation of a fully convolutional denoiser, one image at a time (BatchNorm2d over 12x12 maps)."""
import copy

import torch
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

model = nn.Sequential(
    nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1)
)
opt = torch.optim.Adam(model.parameters(), lr=1e-2)


def image(n, freq):
    r = torch.linspace(0, 6.28, 12)
    phase = 6.28 * torch.rand(n, 1, 1, 1)
    clean = torch.sin(freq * r.view(1, 1, 12, 1) + phase) * torch.cos(freq * r.view(1, 1, 1, 12))
    return clean + 0.3 * torch.randn(n, 1, 12, 12), clean


for i in range(40):
    x, y = image(8, 1.0)
    loss = nn.functional.mse_loss(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
print("pretrained", loss.item())

for task in range(3):
    freq = 0.5 + 0.5 * task
    learner = copy.deepcopy(model).train()
    sgd = torch.optim.SGD(learner.parameters(), lr=0.02)
    for i in range(8):
        x, y = image(1, freq)
        sgd.zero_grad()
        loss = nn.functional.mse_loss(learner(x), y)
        loss.backward()
        sgd.step()
    print(f"task {task} last loss {loss.item():.3f}")
