"""TENT-like test-time adaptation of layer-norm scales by entropy; the model is restored for every corruption."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(11)
torch.set_num_threads(1)

model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
centres = torch.randn(4, 8)


def data(n, shift=0.0):
    y = torch.randint(0, 4, (n,))
    return centres[y] + 0.6 * torch.randn(n, 8) + shift, y


opt = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(60):
    x, y = data(64)
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()

source = copy.deepcopy(model.state_dict())
for name in ("bright", "dark", "tilt", "noise"):
    model.load_state_dict(source)
    shift = 0.5 * torch.randn(8)
    tent = torch.optim.SGD(model[1].parameters(), lr=0.1)
    x, y = data(64, shift)
    trace = []
    for _ in range(8):
        logits = model(x)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        model.zero_grad()
        entropy.backward()
        tent.step()
        trace.append(entropy.item())
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"{name}: entropy {trace[0]:.4f} -> {trace[-1]:.4f} accuracy {accuracy:.2f}")
