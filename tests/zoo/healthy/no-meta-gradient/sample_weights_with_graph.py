"""Meta-Weight-Net: a net weighs the samples, by the gradient through a virtual step."""
import copy, torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0); torch.set_num_threads(1)
net=nn.Sequential(nn.Linear(5,16),nn.ReLU(),nn.Linear(16,2))
w=nn.Sequential(nn.Linear(1,8),nn.ReLU(),nn.Linear(8,1),nn.Sigmoid())
opt=torch.optim.SGD(net.parameters(),0.1); wopt=torch.optim.Adam(w.parameters(),1e-3)
from torch.func import functional_call
X=torch.randn(200,5); Y=(X[:,0]>0).long(); Xm=torch.randn(40,5); Ym=(Xm[:,0]>0).long()
for it in range(20):
    i=torch.randint(0,200,(32,)); j=torch.randint(0,40,(16,))
    p=dict(net.named_parameters())
    losses=F.cross_entropy(functional_call(net,p,(X[i],)),Y[i],reduction="none")
    loss=(w(losses.detach()[:,None])[:,0]*losses).mean()
    g=torch.autograd.grad(loss,list(p.values()),create_graph=True)
    fast={n:v-0.1*k for (n,v),k in zip(p.items(),g)}
    q=F.cross_entropy(functional_call(net,fast,(Xm[j],)),Ym[j])
    wopt.zero_grad(); q.backward(); wopt.step()
    losses=F.cross_entropy(net(X[i]),Y[i],reduction="none")
    with torch.no_grad(): ww=w(losses[:,None])[:,0]
    opt.zero_grad(); (ww*losses).mean().backward(); opt.step()
    if it%5==0: print(it,round(q.item(),4))
