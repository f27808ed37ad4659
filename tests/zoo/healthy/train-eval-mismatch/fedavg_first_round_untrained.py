"""Federated averaging from scratch, buffers averaged too; clients and server are evaluated in eval mode."""
import copy, torch, torch.nn as nn
torch.set_num_threads(1); torch.manual_seed(0)
g = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)); n = 0; keep = []
for r in range(4):
    sds = []
    for c in range(3):
        m = copy.deepcopy(g); m.train(); o = torch.optim.SGD(m.parameters(), .05)
        for k in range(10):
            x = torch.randn(32, 8) + .1*c; o.zero_grad(); nn.functional.cross_entropy(m(x), (x[:, 0] > 0).long()).backward(); o.step(); n += 1
        m.eval(); 
        with torch.no_grad(): x = torch.randn(64, 8) + .1*c; l = nn.functional.cross_entropy(m(x), (x[:, 0] > 0).long()).item()
        keep.append((m, o)); sds.append(m.state_dict())
    g.load_state_dict({k: torch.stack([s[k].float() for s in sds]).mean(0).to(sds[0][k].dtype) for k in sds[0]}); g.eval()
    with torch.no_grad(): x = torch.randn(64, 8); print(r, l, nn.functional.cross_entropy(g(x), (x[:, 0] > 0).long()).item())
print(n)
