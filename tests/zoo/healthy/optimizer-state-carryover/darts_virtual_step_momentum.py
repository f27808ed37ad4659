"""Second-order DARTS: the virtual step carries the momentum of the weights own optimizer."""
import torch
torch.manual_seed(0); torch.set_num_threads(1)
w = torch.randn(6, requires_grad=True); a = torch.zeros(6, requires_grad=True); v = torch.zeros(6)
wo = torch.optim.SGD([w], lr=.05, momentum=.9); ao = torch.optim.Adam([a], lr=.01)
A = torch.randn(20, 6); t = torch.randn(20)
f = lambda w, A, t: ((A * torch.sigmoid(a)) @ w - t).pow(2).mean()
for i in range(8):
    X, Y = torch.randn(20, 6), torch.randn(20)
    buf = wo.state[w].get('momentum_buffer', torch.zeros(6)) if w in wo.state else torch.zeros(6)
    g, = torch.autograd.grad(f(w, A, t), w, create_graph=True)
    w2 = w - .05 * (.9 * buf + g)
    ao.zero_grad(); f(w2, X, Y).backward(); ao.step()
    wo.zero_grad(); f(w, A, t).backward(); wo.step()
    print(i)
