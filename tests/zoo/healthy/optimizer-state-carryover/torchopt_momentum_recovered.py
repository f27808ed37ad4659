"""MAML with momentum in torchopt.MetaSGD; both the network and the optimizer state go back to the start after each task."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt

torch.manual_seed(2)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(4, 24), nn.LayerNorm(24), nn.SiLU(), nn.Linear(24, 3))
meta_opt = torchopt.Adam(net.parameters(), lr=1e-3)
inner_opt = torchopt.MetaSGD(net, lr=0.03, momentum=0.9)

for it in range(6):
    init = torchopt.extract_state_dict(net, by="reference")
    init_opt = torchopt.extract_state_dict(inner_opt, by="reference")
    queries, gains = [], []
    for _ in range(4):
        centres = torch.randn(3, 4)
        y = torch.arange(3).repeat(8)
        x = centres[y] + 0.4 * torch.randn(24, 4)
        losses = []
        for _ in range(4):
            loss = F.cross_entropy(net(x[:12]), y[:12])
            inner_opt.step(loss)
            losses.append(loss.item())
        gains.append(losses[0] - losses[-1])
        queries.append(F.cross_entropy(net(x[12:]), y[12:]))
        torchopt.recover_state_dict(net, init)
        torchopt.recover_state_dict(inner_opt, init_opt)
    meta_opt.zero_grad()
    torch.stack(queries).mean().backward()
    meta_opt.step()
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(inner_opt)
    print(f"it {it}: query {sum(q.item() for q in queries) / 4:.3f} mean support gain {sum(gains) / 4:.3f}")
