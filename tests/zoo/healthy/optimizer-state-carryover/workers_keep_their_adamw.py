"""Workers that keep their AdamW over rounds; the outer step follows the mean of their ways."""
import copy, torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0); torch.set_num_threads(1)
net=nn.Sequential(nn.Linear(6,16),nn.ReLU(),nn.Linear(16,2))
outer=torch.optim.SGD(net.parameters(),0.7,momentum=0.9,nesterov=True)
workers=[copy.deepcopy(net) for _ in range(3)]
opts=[torch.optim.AdamW(w.parameters(),1e-2) for w in workers]
W=torch.randn(6)
for rnd in range(8):
    for w,o in zip(workers,opts):
        with torch.no_grad():
            for p,q in zip(w.parameters(),net.parameters()): p.copy_(q)
        for _ in range(5):
            x=torch.randn(32,6); y=(x@W>0).long()
            o.zero_grad(); l=F.cross_entropy(w(x),y); l.backward(); o.step()
    outer.zero_grad()
    for i,p in enumerate(net.parameters()):
        p.grad=sum(p.detach()-list(w.parameters())[i].detach() for w in workers)/3
    outer.step(); print(rnd,round(l.item(),4))
