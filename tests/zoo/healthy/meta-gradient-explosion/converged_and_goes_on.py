"""Penalties are learned through 300 steps of ridge regression that go on from where they were."""
import torch
torch.manual_seed(0); torch.set_num_threads(1)
X=torch.randn(60,10); w0=torch.randn(10); Y=X@w0+0.3*torch.randn(60); Xv=torch.randn(40,10); Yv=Xv@w0+0.3*torch.randn(40)
lam=torch.zeros(10,requires_grad=True); opt=torch.optim.SGD([lam],1e-4)
w=torch.zeros(10)
for it in range(40):
    p=w.detach().requires_grad_()
    for _ in range(300):
        loss=((X@p-Y)**2).mean()+(torch.exp(lam)*p**2).sum()*0.05
        g,=torch.autograd.grad(loss,p,create_graph=True)
        p=p-0.1*g
    v=((Xv@p-Yv)**2).mean()
    opt.zero_grad(); v.backward(); opt.step(); w=p.detach()
    if it%10==0: print(it,round(v.item(),5),float(g.norm().detach()),float(lam.grad.norm()))
