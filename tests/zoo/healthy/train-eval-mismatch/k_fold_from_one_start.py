"""Cross validation: every fold trains from the same saved start."""
import copy, torch, torch.nn as nn
torch.set_num_threads(1); torch.manual_seed(0)
X = torch.randn(200, 8); Y = (X[:, 0] * X[:, 1] > 0).long(); net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)); init = copy.deepcopy(net.state_dict())
for f in range(4):
    net.load_state_dict(init); opt = torch.optim.Adam(net.parameters(), 1e-2); mask = torch.arange(200) % 4 != f
    for ep in range(4):
        net.train()
        for i in torch.randperm(150).split(25): opt.zero_grad(); nn.functional.cross_entropy(net(X[mask][i]), Y[mask][i]).backward(); opt.step()
    net.eval()
    with torch.no_grad(): print(f, (net(X[~mask]).argmax(1) == Y[~mask]).float().mean().item())
