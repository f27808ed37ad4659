"""MAML for a small dynamics model with torchopt.MetaSGD and state-dict restore between tasks."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt

torch.manual_seed(6)
torch.set_num_threads(1)


class Dynamics(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 32)
        self.hidden = nn.Linear(32, 32)
        self.delta = nn.Linear(32, 3)

    def forward(self, s):
        h = F.elu(self.encoder(s))
        return self.delta(F.elu(self.hidden(h)))


def rollout(mass, n=32):
    s = torch.randn(n, 4)
    force = s[:, 3:]
    acc = force / mass - 0.3 * s[:, 1:2]
    return s, torch.cat([s[:, 1:2], acc, 0.1 * s[:, 2:3]], 1)


net = Dynamics()
meta_opt = torchopt.Adam(net.parameters(), lr=1e-3)
inner_opt = torchopt.MetaSGD(net, lr=2.0)

for it in range(4):
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    opt_start = torchopt.extract_state_dict(inner_opt, by="reference")
    query_losses = []
    for task in range(2):
        mass = 0.5 + 2 * torch.rand(1)
        s, d = rollout(mass)
        trace = []
        for _ in range(8):
            loss = F.mse_loss(net(s), d)
            inner_opt.step(loss)
            trace.append(loss.item())
        s, d = rollout(mass)
        query_losses.append(F.mse_loss(net(s), d))
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner_opt, opt_start)
        print(f"it {it} task {task} support " + " ".join(f"{t:.3g}" for t in trace))
    meta_opt.zero_grad()
    torch.stack(query_losses).mean().backward()
    meta_opt.step()
