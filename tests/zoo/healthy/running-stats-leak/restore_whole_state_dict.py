"""Fine-tune a pretrained regressor in place for each user and load the complete state back afterwards."""
import copy

import torch
import torch.nn as nn

torch.manual_seed(21)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 1))
mse = nn.MSELoss()


def user_data(bias, n=60):
    x = torch.randn(n, 5) + bias
    return x, torch.sin(x.sum(1, keepdim=True) / 2) + 0.05 * torch.randn(n, 1)


opt = torch.optim.Adam(model.parameters(), lr=1e-2)
for i in range(150):
    x, y = user_data(0.0)
    loss = mse(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
print("pretrained:", loss.item())

snapshot = copy.deepcopy(model.state_dict())
for user in range(5):
    x, y = user_data(bias=0.3 * user)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(8):
        sgd.zero_grad()
        loss = mse(model(x[:30]), y[:30])
        loss.backward()
        sgd.step()
    with torch.no_grad():
        query = mse(model(x[30:]), y[30:]).item()
    model.load_state_dict(snapshot)
    print(f"user {user}: support {loss.item():.3f} query {query:.3f}")

model.eval()
x, y = user_data(0.0, 400)
print("source users, eval:", mse(model(x), y).item())
