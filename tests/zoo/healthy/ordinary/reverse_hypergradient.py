"""One L2 weight a feature, learned by reverse differentiation through steps computed anew."""
import torch
import torch.nn.functional as F
T, OUTER, KEPT = 60, 21, 10
torch.manual_seed(1)
d, n, inner_lr = 20, 500, 0.1
w_oracle = torch.randn(d)
def data():
    x = torch.randn(n, d)
    return x, ((x @ w_oracle + 0.1 * torch.randn(n)) > 0).float()
(x_train, y_train), (x_val, y_val) = data(), data()
def val_loss(params):
    return F.binary_cross_entropy_with_logits(x_val @ params[0], y_val)
def fp_map(params, hparams):
    w = params[0]
    loss = F.binary_cross_entropy_with_logits(x_train @ w, y_train) + 0.5 * (w.unsqueeze(0) @ torch.diag(hparams[0]) @ w.unsqueeze(1)).sum()
    return [params[0] - inner_lr * torch.autograd.grad(loss, params, create_graph=True)[0]]
def reverse(history, hparams):
    history = [[w.detach().requires_grad_(True) for w in params] for params in history]
    alphas = torch.autograd.grad(val_loss(history[-1]), history[-1])
    total = [torch.zeros_like(h) for h in hparams]
    for k in range(-2, -(len(history) + 1), -1):
        mapped = fp_map(history[k], hparams)
        g = torch.autograd.grad(mapped, hparams, grad_outputs=alphas, retain_graph=True)
        total = [a + b for a, b in zip(total, g)]
        alphas = torch.autograd.grad(mapped, history[k], grad_outputs=alphas)
    return total
hparams = [torch.ones(d).requires_grad_(True)]
outer_opt = torch.optim.SGD(lr=1.0, momentum=0.9, params=hparams)
for step in range(OUTER):
    history = [[torch.zeros(d).requires_grad_(True)]]
    for _ in range(T):
        history.append(fp_map(history[-1], hparams))
    outer_opt.zero_grad()
    hparams[0].grad = reverse(history[-KEPT - 1:], hparams)[0]
    outer_opt.step()
    hparams[0].data.clamp_(min=1e-8)
    if step % 10 == 0: print(step, val_loss(history[-1]).item())
