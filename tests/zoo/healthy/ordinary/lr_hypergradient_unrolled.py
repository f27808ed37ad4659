"""Learns a learning rate and a weight decay through a 12-step unroll of ridge regression (log-parametrised)."""
import torch
import torch.nn.functional as F

torch.manual_seed(13)
torch.set_num_threads(1)

log_lr = torch.tensor(-3.5, requires_grad=True)
log_wd = torch.tensor(-4.0, requires_grad=True)
hyper_opt = torch.optim.Adam([log_lr, log_wd], lr=0.05)

for it in range(12):
    truth = torch.randn(6, 1)
    x = torch.randn(40, 6)
    y = x @ truth + 0.3 * torch.randn(40, 1)
    w = torch.zeros(6, 1, requires_grad=True)
    losses = []
    for _ in range(12):
        loss = F.mse_loss(x[:20] @ w, y[:20]) + log_wd.exp() * w.pow(2).sum()
        losses.append(loss.item())
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        w = w - log_lr.exp() * g
    validation = F.mse_loss(x[20:] @ w, y[20:])
    hyper_opt.zero_grad()
    validation.backward()
    hyper_opt.step()
    print(f"it {it}: {losses[0]:.3f} -> {losses[-1]:.3f} validation {validation.item():.3f} lr {log_lr.exp().item():.4f}")
