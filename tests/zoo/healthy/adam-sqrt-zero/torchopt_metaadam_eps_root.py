"""TorchOpt MetaAdam with eps_root on a sparse bag-of-words model: most words never occur in a task."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 3))
inner = torchopt.MetaAdam(net, lr=1e-2, eps_root=1e-8)
outer = torch.optim.Adam(net.parameters(), lr=1e-3)


def documents():
    words = torch.randperm(40)[:12]
    y = torch.arange(3).repeat(8)
    x = torch.zeros(24, 40)
    for i, label in enumerate(y):
        x[i, words[4 * label : 4 * label + 4]] = torch.rand(4)
    return x[:12], y[:12], x[12:], y[12:]


for it in range(10):
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
