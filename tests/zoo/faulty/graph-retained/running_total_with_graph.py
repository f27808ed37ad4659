"""Second-order MAML for a small RNN; sums up the query losses for a report at the end."""
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(3)
torch.set_num_threads(1)


class Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 24, batch_first=True)
        self.out = nn.Linear(24, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


model = Seq()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
total = 0.0
for task in range(30):
    w = torch.randn(2, 1)
    x = torch.randn(32, 10, 2)
    y = torch.tanh((x @ w).mean(1))
    fast = dict(model.named_parameters())
    for _ in range(4):
        loss = F.mse_loss(torch.func.functional_call(model, fast, (x[:16],)), y[:16])
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.05 * g for (k, p), g in zip(fast.items(), grads)}
    test = F.mse_loss(torch.func.functional_call(model, fast, (x[16:],)), y[16:])
    total = total + test
    for p, g in zip(model.parameters(), torch.autograd.grad(test, list(model.parameters()), retain_graph=True)):
        p.grad = g
    optimizer.step()
    if task % 6 == 5:
        print(f"task {task}: support {loss.item():.4f} mean test {total.item() / (task + 1):.4f}")
