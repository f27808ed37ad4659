"""MAML on sinusoids with higher: a two-layer MLP, five inner SGD steps."""
import math

import higher
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

INNER_LR = 0.3
INNER_STEPS = 10
META_BATCH = 2


class SineNet(nn.Module):
    def __init__(self, width=40):
        super().__init__()
        self.fc1 = nn.Linear(1, width)
        self.fc2 = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def sample_task():
    amplitude = torch.empty(1).uniform_(1.0, 5.0)
    phase = torch.empty(1).uniform_(0.0, math.pi)
    x = torch.empty(20, 1).uniform_(-5.0, 5.0)
    y = amplitude * torch.sin(x - phase)
    return x[:10], y[:10], x[10:], y[10:]


net = SineNet()
meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

for iteration in range(6):
    meta_opt.zero_grad()
    total = 0.0
    for _ in range(META_BATCH):
        xs, ys, xq, yq = sample_task()
        inner_opt = torch.optim.SGD(net.parameters(), lr=INNER_LR)
        with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            curve = []
            for _ in range(INNER_STEPS):
                loss = F.mse_loss(fnet(xs), ys)
                curve.append(f"{loss.item():.3g}")
                diffopt.step(loss)
            query_loss = F.mse_loss(fnet(xq), yq)
            query_loss.backward()
            print("   support", *curve)
            total += query_loss.item() / META_BATCH
    meta_opt.step()
    print(f"iteration {iteration}: query loss {total:.4f}")
