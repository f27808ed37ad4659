"""Federated averaging where every client keeps its BatchNorm; clients come in any order."""
import copy, random, torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0); random.seed(0); torch.set_num_threads(1)
def make(): return nn.Sequential(nn.Linear(6,16),nn.BatchNorm1d(16),nn.ReLU(),nn.Linear(16,2))
server=make(); clients=[copy.deepcopy(server) for _ in range(4)]
W=torch.randn(6); shift=[torch.randn(6) for _ in range(4)]
def batch(k):
    x=torch.randn(32,6)*(1+k*.2)+shift[k]; return x,((x-shift[k])@W>0).long()
for rnd in range(8):
    order=random.sample(range(4),4)
    for k in order:
        c=clients[k]; st=server.state_dict()
        for name,v in c.state_dict().items():
            if not name.startswith("1."): v.copy_(st[name])
        opt=torch.optim.SGD(c.parameters(),0.05)
        for _ in range(5):
            x,y=batch(k); opt.zero_grad(); F.cross_entropy(c(x),y).backward(); opt.step()
    with torch.no_grad():
        for name,v in server.state_dict().items():
            if not name.startswith("1."): v.copy_(sum(c.state_dict()[name] for c in clients)/4)
    print(rnd,round(sum(F.cross_entropy(clients[k].eval()(batch(k)[0]),batch(k)[1]).item() for k in range(4))/4,4))
    for c in clients: c.train()
