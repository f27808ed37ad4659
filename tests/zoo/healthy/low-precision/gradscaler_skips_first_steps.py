"""Fine-tuning copies under float16 autocast with a GradScaler, whose first scale is too large and gets halved."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
criterion = nn.CrossEntropyLoss()

for task in range(4):
    c = torch.randn(4, 8)
    y = torch.arange(4).repeat(8)
    x = c[y] + 0.4 * torch.randn(32, 8)
    learner = copy.deepcopy(model)
    opt = torch.optim.SGD(learner.parameters(), lr=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    trace = []
    for step in range(12):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(learner(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        trace.append(round(loss.item(), 3))
    with torch.no_grad():
        for p, q in zip(model.parameters(), learner.parameters()):
            p.lerp_(q, 0.1)
    print(f"task {task} scale {scaler.get_scale():.0f} losses {trace}")
