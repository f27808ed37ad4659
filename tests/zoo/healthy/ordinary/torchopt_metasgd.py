"""MAML with torchopt.MetaSGD, extract_state_dict and recover_state_dict."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt

torch.manual_seed(4)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
inner_opt = torchopt.MetaSGD(net, lr=0.05)
meta_opt = torchopt.Adam(net.parameters(), lr=2e-3)

for it in range(8):
    net_state = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    opt_state = torchopt.extract_state_dict(inner_opt, by="reference")
    queries, log = [], []
    for _ in range(3):
        x = torch.randn(30, 3)
        y = torch.tanh(x @ torch.randn(3, 1))
        losses = []
        for _ in range(4):
            loss = F.mse_loss(net(x[:15]), y[:15])
            losses.append(loss.item())
            inner_opt.step(loss)
        queries.append(F.mse_loss(net(x[15:]), y[15:]))
        log.append(f"{losses[0]:.3f}->{losses[-1]:.3f}")
        torchopt.recover_state_dict(net, net_state)
        torchopt.recover_state_dict(inner_opt, opt_state)
    meta_opt.zero_grad()
    torch.stack(queries).mean().backward()
    meta_opt.step()
    torchopt.stop_gradient(net)
    torchopt.stop_gradient(inner_opt)
    print(f"it {it}:", *log)
