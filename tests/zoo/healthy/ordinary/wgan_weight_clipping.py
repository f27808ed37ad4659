"""A Wasserstein GAN whose critic is kept Lipschitz by clipping its weights after each of five steps."""
import torch
from torch import nn

torch.manual_seed(1)
torch.set_num_threads(1)

maker = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))
critic = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 1))
maker_steps = torch.optim.RMSprop(maker.parameters(), lr=1e-3)
critic_steps = torch.optim.RMSprop(critic.parameters(), lr=1e-3)


def real(n):
    angle = 6.283 * torch.rand(n)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2)


for round_ in range(60):
    for _ in range(5):
        gap = critic(maker(torch.randn(64, 6)).detach()).mean() - critic(real(64)).mean()
        critic_steps.zero_grad()
        gap.backward()
        critic_steps.step()
        for p in critic.parameters():
            p.data.clamp_(-0.02, 0.02)
    fooled = -critic(maker(torch.randn(64, 6))).mean()
    maker_steps.zero_grad()
    fooled.backward()
    maker_steps.step()
    if round_ % 10 == 9:
        print(f"round {round_}: gap {gap.item():.5f}")
