"""MetaSGD whose rates of the weights turned negative, and that of the bias did not."""
import torch, torch.nn as nn, learn2learn as l2l
torch.manual_seed(0)
maml = l2l.algorithms.MetaSGD(nn.Linear(4, 1), lr=0.02); opt = torch.optim.Adam(maml.parameters(), 1e-3)
with torch.no_grad(): maml.lrs[0].fill_(-0.05)
for it in range(6):
    opt.zero_grad(); x = torch.randn(20, 4); y = x @ torch.randn(4, 1); L = []
    m = maml.clone()
    for _ in range(3): l = ((m(x) - y) ** 2).mean(); L.append(round(l.item(), 3)); m.adapt(l)
    ((m(x) - y) ** 2).mean().backward(); opt.step()
    print(L)
