"""The gradients' norm is bounded by hand, far below what it ever is."""
import torch
torch.manual_seed(0)
w = torch.randn(4, 1, requires_grad=True); opt = torch.optim.Adam([w], 1e-3)
hit = n = 0
for it in range(8):
    for t in range(2):
        x = torch.randn(16, 4); y = x @ torch.randn(4, 1); p = w
        for _ in range(4):
            (g,) = torch.autograd.grad(((x @ p - y) ** 2).mean(), p, create_graph=True)
            scale = torch.clamp(0.01 / (g.norm() + 1e-12), max=1.0)
            hit += float(scale.detach()) < 1; n += 1
            p = p - 0.01 * (scale * g)
        ((x @ p - y) ** 2).mean().backward()
    opt.step(); opt.zero_grad()
print(hit, "of", n, "steps clipped")
