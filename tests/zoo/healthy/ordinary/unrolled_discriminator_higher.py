"""A generator that looks three steps of its discriminator ahead."""
import higher, torch, torch.nn as nn, torch.nn.functional as F
torch.manual_seed(0); torch.set_num_threads(1)
G=nn.Sequential(nn.Linear(4,16),nn.ReLU(),nn.Linear(16,2)); D=nn.Sequential(nn.Linear(2,16),nn.ReLU(),nn.Linear(16,1))
go=torch.optim.Adam(G.parameters(),1e-3); do=torch.optim.Adam(D.parameters(),1e-3)
inner=torch.optim.SGD(D.parameters(),0.1)
def dl(d,real,fake): return F.softplus(-d(real)).mean()+F.softplus(d(fake)).mean()
for it in range(12):
    real=torch.randn(32,2)+2
    do.zero_grad(); l=dl(D,real,G(torch.randn(32,4)).detach()); l.backward(); do.step()
    with higher.innerloop_ctx(D,inner) as (fd,di):
        fake=G(torch.randn(32,4))
        for _ in range(3): di.step(dl(fd,real,fake))
        gl=F.softplus(-fd(fake)).mean()
        go.zero_grad(); gl.backward(); go.step()
    print(it,round(gl.item(),4))
