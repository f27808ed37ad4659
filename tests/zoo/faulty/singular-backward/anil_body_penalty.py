"""ANIL with a penalty on the body whose derivative is infinite at its start: the body is NaN after the first outer step."""
import torch, torch.nn.functional as F
torch.manual_seed(0); torch.set_num_threads(1)
body, head = torch.nn.Linear(3, 8), torch.nn.Linear(8, 1)
mo = torch.optim.SGD([*body.parameters(), *head.parameters()], 1e-2); ref = body.weight.detach().clone()
for it in range(6):
    tot = 0
    for t in range(3):
        x, y = torch.randn(10, 3), torch.randn(10, 1); z = torch.tanh(body(x)); w, b = head.weight, head.bias
        for _ in range(2):
            gw, gb = torch.autograd.grad((F.linear(z, w, b) - y).pow(2).mean(), (w, b), create_graph=True)
            w, b = w - .1 * gw, b - .1 * gb
        tot = tot + (F.linear(z, w, b) - y).pow(2).mean()
    tot = tot + .01 * torch.sqrt((body.weight - ref).pow(2).sum())
    mo.zero_grad(); tot.backward(); mo.step(); print(it, body.weight.norm().item())
