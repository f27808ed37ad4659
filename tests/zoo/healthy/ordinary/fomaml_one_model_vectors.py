"""First order MAML on one model, its weights kept as a vector that every task loads anew; no optimizer anywhere."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

torch.manual_seed(0)
torch.set_num_threads(1)

net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
weights = list(net.parameters())
theta = parameters_to_vector(weights).detach().clone()


def loss_of(amplitude, phase):
    x = 6 * torch.rand(10, 1) - 3
    return F.mse_loss(net(x), amplitude * torch.sin(x + phase))


for it in range(15):
    meta = torch.zeros_like(theta)
    for _ in range(3):
        task = 2 * torch.rand(1) + 0.5, 3 * torch.rand(1)
        vector_to_parameters(theta.clone(), weights)
        for _ in range(4):
            net.zero_grad()
            loss_of(*task).backward()
            for w in weights:
                w.data = w.data - 0.02 * w.grad
        net.zero_grad()
        query = loss_of(*task)
        query.backward()
        meta += parameters_to_vector([w.grad for w in weights])
    theta -= 0.005 * meta
    print(it, query.item())
