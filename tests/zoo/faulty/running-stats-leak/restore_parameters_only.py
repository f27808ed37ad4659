"""Evaluate a pretrained regressor by fine-tuning it in place and putting the weights back after each user."""
import torch
import torch.nn as nn

torch.manual_seed(21)
torch.set_num_threads(1)


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 40)
        self.norm = nn.BatchNorm1d(40)
        self.out = nn.Linear(40, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.embed(x))))


def user_data(bias, n=60):
    x = torch.randn(n, 5) + bias
    y = torch.sin(x.sum(1, keepdim=True) / 2) + 0.05 * torch.randn(n, 1)
    return x, y


model = Regressor()
opt = torch.optim.Adam(model.parameters(), lr=1e-2)
model.train()
for i in range(150):
    x, y = user_data(0.0)
    loss = ((model(x) - y) ** 2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
print("pretrained:", loss.item())

saved = {name: p.detach().clone() for name, p in model.named_parameters()}
for user in range(5):
    x, y = user_data(bias=2.0 * user)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(8):
        sgd.zero_grad()
        loss = ((model(x[:30]) - y[:30]) ** 2).mean()
        loss.backward()
        sgd.step()
    with torch.no_grad():
        query = ((model(x[30:]) - y[30:]) ** 2).mean().item()
        for name, p in model.named_parameters():
            p.copy_(saved[name])
    print(f"user {user}: support {loss.item():.3f} query {query:.3f}")

model.eval()
x, y = user_data(0.0, 400)
print("source users, eval:", ((model(x) - y) ** 2).mean().item())
