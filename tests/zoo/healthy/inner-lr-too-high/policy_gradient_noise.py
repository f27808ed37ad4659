"""MAML-RL like: policy gradients of sampled bandit actions; the surrogate's value is noise around zero."""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(11)
torch.set_num_threads(1)

policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5))
meta = torch.optim.Adam(policy.parameters(), lr=1e-2)


def surrogate(weights, goal, n=20):
    state = torch.randn(n, 4)
    logits = torch.func.functional_call(policy, weights, (state,))
    actions = torch.distributions.Categorical(logits=logits).sample()
    reward = (actions == goal).float() + 0.3 * torch.randn(n)
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    return -(advantage * F.log_softmax(logits, 1)[torch.arange(n), actions]).mean(), reward.mean()


for it in range(25):
    meta.zero_grad()
    goal = torch.randint(0, 5, (1,))
    fast = dict(policy.named_parameters())
    for _ in range(4):
        loss, reward = surrogate(fast, goal)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {k: p - 0.5 * g for (k, p), g in zip(fast.items(), grads)}
    query, after = surrogate(fast, goal)
    query.backward()
    meta.step()
    print(it, loss.item(), reward.item(), after.item())
