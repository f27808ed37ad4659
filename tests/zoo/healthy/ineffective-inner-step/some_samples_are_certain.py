"""One step of entropy minimisation a test sample, on a copy; of some samples the network is certain already."""
import copy
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(4)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 4))
truth = torch.randn(8, 4)
adam = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(200):
    x = torch.randn(128, 8)
    loss = F.cross_entropy(net(x), (x @ truth).argmax(1))
    adam.zero_grad()
    loss.backward()
    adam.step()

for sample, size in enumerate((1.0, 6.0, 0.5, 5.0, 0.8, 7.0, 1.2, 6.0)):
    views = size * torch.randn(8) + 0.1 * torch.randn(16, 8)
    learner = copy.deepcopy(net)
    sgd = torch.optim.SGD(learner.parameters(), lr=5e-3)
    mean = learner(views).softmax(1).mean(0)
    entropy = -(mean * (mean + 1e-12).log()).sum()
    sgd.zero_grad()
    entropy.backward()
    sgd.step()
    print(f"{sample}: entropy {entropy.item():.2e} -> class {learner(views).mean(0).argmax().item()}")
