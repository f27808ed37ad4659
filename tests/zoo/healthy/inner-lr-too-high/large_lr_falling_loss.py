"""Big inner steps on a flat problem: the learning rate is 2, the curvature small, the loss falls at every step."""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

w0 = torch.zeros(8, 1, requires_grad=True)
outer = torch.optim.Adam([w0], lr=5e-3)
for it in range(8):
    truth = torch.randn(8, 1)
    x = 0.3 * torch.randn(60, 8)
    y = x @ truth
    w, losses = w0, []
    for _ in range(8):
        loss = F.mse_loss(x[:30] @ w, y[:30])
        losses.append(loss.item())
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        w = w - 2.0 * g
    query = F.mse_loss(x[30:] @ w, y[30:])
    outer.zero_grad()
    query.backward()
    outer.step()
    print(f"it {it}: " + " ".join(f"{v:.4f}" for v in losses) + f" query {query.item():.4f}")
