"""Omniglot-like MAML with higher on a small conv net, five inner steps per episode."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

N_WAY, K_SHOT, K_QUERY = 5, 2, 4
INNER_LR = 1e-6


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8 * 9, N_WAY)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.classifier(x.flatten(1))


def episode():
    prototypes = torch.randn(N_WAY, 1, 12, 12)
    ys = torch.arange(N_WAY).repeat(K_SHOT)
    yq = torch.arange(N_WAY).repeat(K_QUERY)
    xs = prototypes[ys] + 0.4 * torch.randn(len(ys), 1, 12, 12)
    xq = prototypes[yq] + 0.4 * torch.randn(len(yq), 1, 12, 12)
    return xs, ys, xq, yq


model = ConvNet()
meta = torch.optim.Adam(model.parameters(), lr=1e-3)

for it in range(8):
    xs, ys, xq, yq = episode()
    inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
    meta.zero_grad()
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fmodel, diffopt):
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(fmodel(xs), ys)
            diffopt.step(loss)
            losses.append(loss.item())
        logits = fmodel(xq)
        F.cross_entropy(logits, yq).backward()
    meta.step()
    acc = (logits.argmax(1) == yq).float().mean().item()
    print(f"it {it} support {losses[0]:.5f} -> {losses[-1]:.5f} query acc {acc:.2f}")
