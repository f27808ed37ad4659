"""GRU sequence model normalised by BatchNorm on its last state; each user contributes two sequences."""
import torch
import torch.nn as nn
import torchopt

torch.manual_seed(14)
torch.set_num_threads(1)


class SequenceModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 20, batch_first=True)
        self.bn = nn.BatchNorm1d(20)
        self.fc = nn.Linear(20, 2)

    def forward(self, x):
        _, h = self.rnn(x)
        return self.fc(self.bn(h[-1]))


def user(n_query=12):
    drift = torch.randn(3)
    t = torch.linspace(0, 1, 10).view(1, 10, 1)

    def draw(n):
        y = torch.arange(n) % 2
        sign = (2.0 * y - 1).view(-1, 1, 1)
        return sign * drift * t + 0.2 * torch.randn(n, 10, 3), y

    return draw(2), draw(n_query)


model = SequenceModel()
inner = torchopt.MetaSGD(model, lr=0.1)
outer = torch.optim.Adam(model.parameters(), lr=2e-3)
ce = nn.CrossEntropyLoss()
init = torchopt.extract_state_dict(inner, by="copy")
for it in range(10):
    state = torchopt.extract_state_dict(model, by="reference", with_buffers=True, detach_buffers=True)
    (xs, ys), (xq, yq) = user()
    for _ in range(3):
        support = ce(model(xs), ys)
        inner.step(support)
    query = ce(model(xq), yq)
    outer.zero_grad()
    query.backward()
    torchopt.recover_state_dict(model, state)
    torchopt.recover_state_dict(inner, init)
    outer.step()
    print(f"user {it} support {support.item():.3f} query {query.item():.3f}")
