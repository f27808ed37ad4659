"""TorchOpt MetaAdam on a sparse bag-of-words model: most words never occur in a task."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt

torch.manual_seed(0)
torch.set_num_threads(1)


class BagOfWords(nn.Module):
    def __init__(self, vocab=40, n_class=3):
        super().__init__()
        self.embed = nn.Linear(vocab, 16)
        self.out = nn.Linear(16, n_class)

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x)))


def documents():
    words = torch.randperm(40)[:12]
    y = torch.arange(3).repeat(8)
    x = torch.zeros(24, 40)
    for i, label in enumerate(y):
        x[i, words[4 * label : 4 * label + 4]] = torch.rand(4)
    return x[:12], y[:12], x[12:], y[12:]


net = BagOfWords()
inner = torchopt.MetaAdam(net, lr=1e-2)
outer = torch.optim.Adam(net.parameters(), lr=1e-3)
for it in range(6):
    net_state = torchopt.extract_state_dict(net, by="reference")
    opt_state = torchopt.extract_state_dict(inner, by="copy")
    xs, ys, xq, yq = documents()
    trace = []
    for _ in range(4):
        loss = F.cross_entropy(net(xs), ys)
        inner.step(loss)
        trace.append(round(loss.item(), 3))
    query = F.cross_entropy(net(xq), yq)
    outer.zero_grad()
    query.backward()
    torchopt.recover_state_dict(net, net_state)
    torchopt.recover_state_dict(inner, opt_state)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    outer.step()
    print(f"iter {it} inner {trace} query {query.item():.3f} meta-gradient {grad_norm.item():.3f}")
