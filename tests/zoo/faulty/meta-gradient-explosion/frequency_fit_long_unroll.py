"""Meta-learns where to start fitting the frequencies of a bounded signal; the inner fit is unrolled further and further."""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

N_COMPONENTS = 6
omega0 = torch.linspace(0.5, 3.0, N_COMPONENTS).requires_grad_()
phase0 = torch.zeros(N_COMPONENTS, requires_grad=True)
outer = torch.optim.Adam([omega0, phase0], lr=1e-3)
t = torch.linspace(-3, 3, 40)


def signal(omega, phase):
    return torch.sin(omega[:, None] * t + phase[:, None]).mean(0)


for it, unroll in enumerate([3, 5, 10, 20, 30, 40]):
    target = signal(omega0.detach() + 0.5 * torch.randn(N_COMPONENTS), torch.randn(N_COMPONENTS))
    omega, phase = omega0, phase0
    first = None
    for _ in range(unroll):
        loss = F.mse_loss(signal(omega, phase), target)
        first = first or loss.item()
        g_omega, g_phase = torch.autograd.grad(loss, (omega, phase), create_graph=True)
        omega, phase = omega - 24.0 * g_omega, phase - 24.0 * g_phase
    query = F.mse_loss(signal(omega, phase), target)
    outer.zero_grad()
    query.backward()
    norm = omega0.grad.norm().item()
    outer.step()
    print(f"it {it} unroll {unroll}: {first:.4f} -> {query.item():.4f}, meta-gradient {norm:.3g}")
