"""higher.monkeypatch evaluation of a compiled LayerNorm MLP with an Adam inner optimizer."""
import higher
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(3)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))
model.compile(backend="aot_eager")
inner_opt = torch.optim.Adam(model.parameters(), lr=1e-2)

for task in range(5):
    centers = torch.randn(4, 10)
    y = torch.arange(4).repeat(10)
    x = centers[y] + 0.4 * torch.randn(40, 10)
    fmodel = higher.monkeypatch(model, track_higher_grads=False)
    diffopt = higher.get_diff_optim(inner_opt, model.parameters(), fmodel=fmodel, track_higher_grads=False)
    for step in range(5):
        loss = F.cross_entropy(fmodel(x[:20]), y[:20])
        diffopt.step(loss)
        print(f"task {task} step {step} loss {loss.item():.4f}")
    acc = (fmodel(x[20:]).argmax(1) == y[20:]).float().mean()
    print(f"task {task} accuracy {acc.item():.2f}")
