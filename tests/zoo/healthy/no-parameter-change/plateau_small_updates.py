"""Logistic adaptation that starts on a sigmoid plateau: the first steps are small, then the loss falls."""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)

w0 = (0.02 * torch.randn(16, 4)).requires_grad_()
w1 = (0.02 * torch.randn(1, 16)).requires_grad_()
theta = [w0, w1]
outer = torch.optim.Adam(theta, lr=1e-3)

for it in range(5):
    direction = torch.randn(4, 1)
    x = torch.randn(60, 4)
    y = torch.tanh(x @ direction)
    fast, trace = theta, []
    for _ in range(60):
        loss = F.mse_loss(torch.tanh(x[:30] @ fast[0].T) @ fast[1].T, y[:30])
        trace.append(loss.item())
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        fast = [w - 0.1 * g for w, g in zip(fast, grads)]
    query = F.mse_loss(torch.tanh(x[30:] @ fast[0].T) @ fast[1].T, y[30:])
    outer.zero_grad()
    query.backward()
    outer.step()
    print(it, " ".join(f"{trace[i]:.4f}" for i in (0, 5, 10, 20, 40, 59)), f"query {query.item():.4f}")
