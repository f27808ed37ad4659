"""An LSTM learns to optimise, truncated every five steps: near the optimum its losses go up and down."""
import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
cell, head = nn.LSTMCell(1, 16), nn.Linear(16, 1)
nn.init.zeros_(head.bias)
outer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=1e-2)


def preprocessed(gradient):
    size = (gradient.abs() + 1e-10).log().clamp(min=-8) / 8
    return (gradient.sign() * (1 + size)).detach()[:, None]


for episode in range(30):
    a, b = torch.randn(10, 10) / 10**0.5 + torch.eye(10), torch.randn(10)
    point = torch.randn(10, requires_grad=True)
    state = (torch.zeros(10, 16), torch.zeros(10, 16))
    total, losses = 0.0, []
    for step in range(1, 21):
        loss = ((a @ point - b) ** 2).mean()
        total = total + loss
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, point, retain_graph=True)
        state = cell(preprocessed(gradient), state)
        point = point + 0.1 * head(state[0]).squeeze(1)
        if step % 5 == 0:
            outer.zero_grad()
            (total + ((a @ point - b) ** 2).mean()).backward()
            outer.step()
            total = 0.0
            point = point.detach().requires_grad_()
            state = tuple(s.detach() for s in state)
    if episode % 6 == 5:
        print(f"{episode}: {losses[0]:.3f} -> {losses[-1]:.3f}")
