"""Betty: the ridge of a regression is learned; the lower level takes plain gradient steps."""
import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn

torch.manual_seed(32)
torch.set_num_threads(1)

x = torch.randn(40, 6)
y = x @ torch.randn(6, 1) + 0.1 * torch.randn(40, 1)


class Ridge(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(-3.0))

    def forward(self):
        return self.log.exp()


class Outer(ImplicitProblem):
    def training_step(self, batch):
        return F.mse_loss(self.inner(batch[0]), batch[1])


class Inner(ImplicitProblem):
    def training_step(self, batch):
        penalty = sum(p.square().sum() for p in self.module.parameters())
        return F.mse_loss(self.module(batch[0]), batch[1]) + self.outer() * penalty


ridge, model = Ridge(), nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
outer = Outer(
    name="outer", module=ridge, optimizer=torch.optim.Adam(ridge.parameters(), lr=0.05),
    train_data_loader=[(x[20:], y[20:])], config=Config(type="darts"),
)
inner = Inner(
    name="inner", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=3.0),
    train_data_loader=[(x[:20], y[:20])], config=Config(type="darts", unroll_steps=5),
)
Engine(
    config=EngineConfig(train_iters=40), problems=[outer, inner],
    dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
).run()
print(ridge().item())
