"""MAML with momentum in torchopt.MetaSGD: network weights are recovered after each task."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt

torch.manual_seed(2)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(4, 24), nn.LayerNorm(24), nn.SiLU(), nn.Linear(24, 3))
meta_opt = torchopt.Adam(net.parameters(), lr=1e-3)

for it in range(6):
    inner_opt = torchopt.MetaSGD(net, lr=0.03, momentum=0.9)
    init = torchopt.extract_state_dict(net, by="reference")
    queries = []
    for _ in range(4):
        centres = torch.randn(3, 4)
        y = torch.arange(3).repeat(8)
        x = centres[y] + 0.4 * torch.randn(24, 4)
        for _ in range(4):
            inner_opt.step(F.cross_entropy(net(x[:12]), y[:12]))
        queries.append(F.cross_entropy(net(x[12:]), y[12:]))
        torchopt.recover_state_dict(net, init)
    meta_opt.zero_grad()
    loss = torch.stack(queries).mean()
    loss.backward()
    meta_opt.step()
    torchopt.stop_gradient(net)
    print(f"it {it}: query " + " ".join(f"{q.item():.3f}" for q in queries))
