"""What a loop itself knows of its steps: the ground truth a recording is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TASKS, STEPS, RATE = 2, 3, 0.05
#: Meta-batches: enough for a loop to be learned, and then to be known by heart.
ROUNDS = 6
NAMES = ("first.weight", "first.bias", "second.weight", "second.bias")


@dataclass
class Step:
    """One inner step: its loss, and every parameter's norm before and after."""

    loss: float
    before: dict[str, float]
    after: dict[str, float]


@dataclass
class Outer:
    """One outer step: how many tasks had begun, and every parameter's norm before and after."""

    tasks: int
    before: dict[str, float]
    after: dict[str, float]


@dataclass
class Notes:
    """The tasks of a run in order, each a list of its steps, and its outer steps.

    ``alive`` are models that live until the end of the run, as a script's do.
    """

    tasks: list[list[Step]] = field(default_factory=list)
    outer_steps: list[Outer] = field(default_factory=list)
    alive: list[nn.Module] = field(default_factory=list)

    def task(self) -> None:
        """A task begins."""
        self.tasks.append([])

    def values(self, parameters: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, float]:
        """Norms as they are now, read past every function mode."""
        if not isinstance(parameters, Mapping):
            parameters = dict(zip(NAMES, parameters, strict=True))
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return {name: float(p.detach().norm()) for name, p in parameters.items()}

    def step(
        self, loss: Tensor, before: dict[str, float], after: Mapping[str, Tensor] | Sequence[Tensor]
    ) -> None:
        """A step was taken."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            value = float(loss.detach())
        self.tasks[-1].append(Step(value, before, self.values(after)))

    def outer(
        self, parameters: Mapping[str, Tensor] | Sequence[Tensor], step: Callable[[], object]
    ) -> None:
        """Take an outer step of the base's parameters."""
        before = self.values(parameters)
        step()
        self.outer_steps.append(Outer(len(self.tasks), before, self.values(parameters)))


class Net(nn.Module):
    """Two layers, in double precision, so that a comparison to 1e-6 is about what was recorded."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6, affine=False) if batch_norm else nn.Identity()
        self.second = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """The same net as plain functions."""
    first, first_bias, second, second_bias = parameters
    return F.linear(torch.tanh(F.linear(x, first, first_bias)), second, second_bias)


def batch() -> tuple[Tensor, Tensor]:
    """A small regression task's data."""
    x = torch.randn(8, 4, dtype=torch.float64)
    return x, torch.sin(x[:, :3]) + 0.1 * torch.randn(8, 3, dtype=torch.float64)


def named(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters, whatever tensors they are at the moment."""
    return dict(module.named_parameters())


Update = Callable[[Tensor, list[Tensor], dict[str, list[Tensor]], bool], list[Tensor]]


def functional_loop(notes: Notes, update: Update, second_order: bool) -> None:
    """MAML over a list of tensors: ``update`` gives the next ones."""
    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(ROUNDS):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            fast, state = list(net.parameters()), {}
            for _ in range(STEPS):
                loss = F.mse_loss(forward(fast, x), y)
                before = notes.values(fast)
                fast = update(loss, fast, state, second_order)
                notes.step(loss, before, fast)
            query = F.mse_loss(forward(fast, x), y)
            if query.requires_grad:
                query.backward()
        notes.outer(named(net), outer.step)


def in_place_loop(notes: Notes, update: Callable[[nn.Module, Tensor], None]) -> None:
    """First-order MAML on deep copies: ``update`` moves the copy's parameters in place."""
    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            learner = copy.deepcopy(net)
            for _ in range(STEPS):
                loss = F.mse_loss(learner(x), y)
                before = notes.values(named(learner))
                update(learner, loss)
                notes.step(loss, before, named(learner))
            first_order_outer(net, learner, F.mse_loss(learner(x), y))
        notes.outer(named(net), outer.step)


def first_order_outer(net: nn.Module, learner: nn.Module, query: Tensor) -> None:
    """The query's gradient at the adapted weights becomes the base's."""
    gradients = torch.autograd.grad(query, list(learner.parameters()))
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient


def each(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and its gradient."""
    return zip(parameters, gradients, strict=True)
