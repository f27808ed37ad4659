"""Bilevel optimisation with betty: per-feature ridge penalties outside, a linear model inside."""
import logging

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn

torch.manual_seed(14)
torch.set_num_threads(1)
logging.disable(logging.INFO)

truth = torch.cat([torch.randn(3), torch.zeros(5)]).unsqueeze(1)
x = torch.randn(60, 8)
y = x @ truth + 0.5 * torch.randn(60, 1)


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_lambda = nn.Parameter(torch.full((8,), -3.0))

    def forward(self):
        return self.log_lambda.exp()


class Inner(ImplicitProblem):
    def training_step(self, batch):
        bx, by = batch
        loss = F.mse_loss(self.module(bx), by)
        return loss + (self.outer() * self.module.weight.pow(2)).sum()


class Outer(ImplicitProblem):
    def training_step(self, batch):
        bx, by = batch
        loss = F.mse_loss(self.inner(bx), by)
        if self.count % 5 == 1:
            print(f"outer step {self.count}: validation {loss.item():.4f}")
        return loss


linear, penalty = nn.Linear(8, 1), Penalty()
inner = Inner(
    name="inner", module=linear, optimizer=torch.optim.SGD(linear.parameters(), lr=0.05),
    train_data_loader=[(x[:30], y[:30])], config=Config(type="darts", unroll_steps=4),
)
outer = Outer(
    name="outer", module=penalty, optimizer=torch.optim.Adam(penalty.parameters(), lr=0.05),
    train_data_loader=[(x[30:], y[30:])], config=Config(type="darts"),
)
engine = Engine(
    config=EngineConfig(train_iters=80, logger_type="none"), problems=[outer, inner],
    dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
)
engine.run()
print("penalties", [round(v, 3) for v in penalty().tolist()])
