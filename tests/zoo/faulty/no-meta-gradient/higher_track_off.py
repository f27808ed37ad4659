"""Sinusoid MAML with higher and track_higher_grads switched off to save memory."""
import higher
import torch
import torch.nn as nn

torch.manual_seed(1)
torch.set_num_threads(1)


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x):
        return self.net(x)


model = Sine()
mse = nn.MSELoss()
outer = torch.optim.SGD(model.parameters(), lr=1e-2)

for step in range(6):
    outer.zero_grad()
    for task in range(2):
        x = 6 * torch.rand(20, 1) - 3
        y = (1 + torch.rand(1)) * torch.sin(x + 3 * torch.rand(1))
        inner = torch.optim.SGD(model.parameters(), lr=0.02)
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False, track_higher_grads=False) as (f, opt):
            losses = []
            for _ in range(5):
                loss = mse(f(x[:10]), y[:10])
                losses.append(loss.item())
                opt.step(loss)
            query = mse(f(x[10:]), y[10:])
            query.backward()
        print(f"step {step} task {task}: {losses[0]:.3f} -> {losses[-1]:.3f} query {query.item():.3f}")
    outer.step()
