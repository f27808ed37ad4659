"""Spike-count model: meta-learned tuning curves with an exponential link, adapted per neuron."""
import higher
import torch
import torch.nn as nn

torch.manual_seed(7)
torch.set_num_threads(1)


class RateModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.basis = nn.Linear(2, 16)
        self.gain = nn.Linear(16, 1)

    def forward(self, stimulus):
        return self.gain(torch.sigmoid(self.basis(stimulus)))


def neuron():
    w = torch.randn(2, 1)
    stimulus = torch.randn(40, 2)
    counts = torch.poisson(torch.exp(0.8 + (stimulus @ w).clamp(-2, 1.5)))
    return stimulus, counts


model = RateModel()
nll = nn.PoissonNLLLoss(log_input=True)
meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)

for step in range(5):
    stimulus, counts = neuron()
    inner = torch.optim.SGD(model.parameters(), lr=0.8)
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fmodel, diffopt):
        losses = []
        for _ in range(8):
            loss = nll(fmodel(stimulus[:20]), counts[:20])
            losses.append(loss.item())
            diffopt.step(loss)
        held_out = nll(fmodel(stimulus[20:]), counts[20:])
    meta_opt.zero_grad()
    held_out.backward()
    meta_opt.step()
    print("neuron", step, [f"{v:.3g}" for v in losses], f"held out {held_out.item():.3g}")
