"""Meta-test of a given initialisation with higher: no higher-order gradients, no outer optimizer."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)

model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))

for task in range(8):
    centres = torch.randn(4, 8)
    y = torch.arange(4).repeat(5)
    xs, xq = (centres[y] + 0.6 * torch.randn(20, 8) for _ in range(2))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, inner, track_higher_grads=False) as (fmodel, opt):
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(fmodel(xs), y)
            losses.append(loss.item())
            opt.step(loss)
        with torch.no_grad():
            accuracy = (fmodel(xq).argmax(1) == y).float().mean().item()
    print(f"task {task}: {losses[0]:.3f} -> {losses[-1]:.3f} accuracy {accuracy:.2f}")
