"""Two optimizers a copy, body and head; both clear their gradients."""
import copy, torch
torch.manual_seed(0); torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
for t in range(8):
    f = copy.deepcopy(net); x, y = torch.randn(20, 5), torch.randn(20, 1)
    o1 = torch.optim.SGD(f[0].parameters(), .05); o2 = torch.optim.SGD(f[2].parameters(), .05)
    for k in range(4):
        o1.zero_grad(); o2.zero_grad()
        torch.nn.functional.mse_loss(f(x), y).backward(); o1.step(); o2.step()
    print(t)
