"""What tasks begin from is a base, whatever it is a copy of: moving it is an outer step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

import divergence_probe

RATE, STEPS, TASKS, ITERATIONS = 0.05, 2, 3, 3
EXACT = (ITERATIONS * TASKS, ITERATIONS * TASKS * STEPS, ITERATIONS)


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Nets of earlier tests would be looked at, too: of several models alive a few are tried."""
    gc.collect()


#: A task's query loss, or what it gives as the base's gradient.
Result = Tensor | list[Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3), torch.randn(8, 2)


def forward(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, *weights[:2])), *weights[2:])


def gradients(weights: Sequence[Tensor], x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(F.mse_loss(forward(weights, x), y), weights, **options))


def by_hand(base: nn.Module) -> Result:
    (x, y), fast = batch(), list(base.parameters())
    for _ in range(STEPS):
        grads = gradients(fast, x, y, create_graph=True)
        fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
    return F.mse_loss(forward(fast, x), y)


def transformed(base: nn.Module) -> Result:
    (x, y), fast = batch(), dict(base.named_parameters())
    for _ in range(STEPS):
        grads = grad(lambda w: F.mse_loss(functional_call(base, w, (x,)), y))(fast)
        fast = {name: w - RATE * grads[name] for name, w in fast.items()}
    return F.mse_loss(functional_call(base, fast, (x,)), y)


def in_higher(base: nn.Module) -> Result:
    higher = pytest.importorskip("higher")
    x, y = batch()
    inner = torch.optim.SGD(base.parameters(), lr=RATE)
    with higher.innerloop_ctx(base, inner, copy_initial_weights=False) as (fast, stepper):
        for _ in range(STEPS):
            stepper.step(F.mse_loss(fast(x), y))
        return F.mse_loss(fast(x), y)


def deep_copy(base: nn.Module) -> Result:
    (x, y), learner = batch(), copy.deepcopy(base)
    inner = torch.optim.SGD(learner.parameters(), lr=RATE)
    for _ in range(STEPS):
        inner.zero_grad()
        F.mse_loss(learner(x), y).backward()
        inner.step()
    return gradients(list(learner.parameters()), x, y)


def clones_of(base: nn.Module) -> list[Tensor]:
    """Copies whose origin nothing tells but their values."""
    return [parameter.detach().clone().requires_grad_() for parameter in base.parameters()]


def clones_replaced(base: nn.Module) -> Result:
    (x, y), fast = batch(), clones_of(base)
    for _ in range(STEPS):
        grads = gradients(fast, x, y)
        fast = [(w - RATE * g).detach().requires_grad_() for w, g in zip(fast, grads, strict=True)]
    return gradients(fast, x, y)


def clones_in_place(base: nn.Module) -> Result:
    (x, y), fast = batch(), clones_of(base)
    for _ in range(STEPS):
        for weight, gradient in zip(fast, gradients(fast, x, y), strict=True):
            weight.data -= RATE * gradient
    return gradients(fast, x, y)


def clones_in_an_optimizer(base: nn.Module) -> Result:
    (x, y), fast = batch(), clones_of(base)
    inner = torch.optim.SGD(fast, lr=RATE)
    for _ in range(STEPS):
        inner.zero_grad()
        F.mse_loss(forward(fast, x), y).backward()
        inner.step()
    return gradients(fast, x, y)


class Implicit(torch.autograd.Function):
    """Adapts clones of what it is given; the gradient of the result is the base's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *base: Tensor) -> tuple[Tensor, ...]:
        fast = [weight.clone().detach_().requires_grad_() for weight in base]
        with torch.enable_grad():
            for _ in range(STEPS):
                for weight, gradient in zip(fast, gradients(fast, x, y), strict=True):
                    weight.data.add_(gradient, alpha=-RATE)
        return tuple(weight.detach() for weight in fast)

    @staticmethod
    def backward(ctx: Any, *adapted: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *adapted


def implicit(base: nn.Module) -> Result:
    """As implicit MAML, and anything that solves an inner problem within a function."""
    x, y = batch()
    return F.mse_loss(forward(Implicit.apply(x, y, *base.parameters()), x), y)


class ByOptimizer:
    """The outer step of ``torch.optim``."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.optimizer = torch.optim.Adam(base.parameters(), lr=0.01)

    def step(self, results: list[Result]) -> None:
        self.optimizer.zero_grad()
        if isinstance(results[0], Tensor):
            torch.stack(results).mean().backward()  # type: ignore[arg-type]
        else:
            for parameter, *grads in zip(self.base.parameters(), *results, strict=True):
                parameter.grad = torch.stack(grads).mean(0)
        self.optimizer.step()


class ByHand:
    """The outer step in place, with the gradient taken of the base."""

    def __init__(self, base: nn.Module) -> None:
        self.base = list(base.parameters())

    def step(self, results: list[Result]) -> None:
        grads = torch.autograd.grad(torch.stack(results).mean(), self.base)  # type: ignore[arg-type]
        for parameter, gradient in zip(self.base, grads, strict=True):
            parameter.data -= 0.01 * gradient


def train(task: Callable[[nn.Module], Result], outer: Any, base: nn.Module) -> None:
    for _ in range(ITERATIONS):
        outer.step([task(base) for _ in range(TASKS)])


def counted(probe: divergence_probe.Probe) -> tuple[int, int, int]:
    assert probe.failure is None
    summary = probe.diagnosis.summary
    return summary.tasks, summary.inner_steps, summary.outer_steps


SECOND_ORDER = (by_hand, transformed, in_higher, implicit)
FIRST_ORDER = (deep_copy, clones_replaced, clones_in_place, clones_in_an_optimizer)


@pytest.mark.parametrize("original_lives", [True, False])
@pytest.mark.parametrize("copied_before", [True, False])
@pytest.mark.parametrize(
    ("task", "outer"),
    [
        *((task, ByOptimizer) for task in SECOND_ORDER + FIRST_ORDER),
        *((task, ByHand) for task in SECOND_ORDER),
    ],
)
def test_a_deep_copy_that_tasks_begin_from_is_moved_by_outer_steps(
    task: Callable[[nn.Module], Result], outer: Any, copied_before: bool, original_lives: bool
) -> None:
    original: nn.Module | None = network()
    base = copy.deepcopy(original) if copied_before else None
    with divergence_probe.attach() as probe:
        base = base or copy.deepcopy(original)
        original = original if original_lives else None
        train(task, outer(base), base)

    assert counted(probe) == EXACT
    steps = probe.recording.steps()
    names = [name for name, _ in base.named_parameters()]
    assert list(dict.fromkeys(steps[steps.phase == "outer"].parameter)) == names
    assert set(steps.parameter) == set(names)
    assert not {finding.rule for finding in probe.diagnosis.findings} - {"MG003"}


@pytest.mark.parametrize("task", FIRST_ORDER)
def test_a_copy_that_nothing_begins_from_is_trained_as_any_model(
    task: Callable[[nn.Module], Result],
) -> None:
    """The healthy look-alike: equal to the base while its first tasks ran, and then left behind.

    (What is trained of it may count as one more task, as any copy's of a base.)
    """
    base = network()
    with divergence_probe.attach() as probe:
        baseline = copy.deepcopy(base)
        train(task, ByOptimizer(base), base)
        optimizer = torch.optim.SGD(baseline.parameters(), lr=0.01)
        for _ in range(5):
            x, y = batch()
            optimizer.zero_grad()
            F.mse_loss(baseline(x), y).backward()
            optimizer.step()

    assert probe.failure is None and probe.diagnosis.summary.outer_steps == ITERATIONS


@pytest.mark.parametrize("task", FIRST_ORDER)
def test_copies_are_adapted_where_the_base_stays(task: Callable[[nn.Module], Result]) -> None:
    """Nothing moves the base, and no copy of it becomes one: an evaluation after training."""
    base = network()
    with divergence_probe.attach() as probe:
        for _ in range(4):
            task(base)

    assert counted(probe) == (4, 4 * STEPS, 0)


@pytest.mark.parametrize("moved_by_optimizer", [True, False])
def test_clones_stepped_by_an_optimizer_keep_their_name_and_task(moved_by_optimizer: bool) -> None:
    """Only at their first step do their values tell what they are clones of."""
    base = network()
    with divergence_probe.attach() as probe:
        outer = ByOptimizer(base)
        for _ in range(ITERATIONS):
            results = [clones_in_an_optimizer(base) for _ in range(TASKS)]
            if moved_by_optimizer:
                outer.step(results)

    assert counted(probe)[:2] == EXACT[:2]
    assert set(probe.recording.steps().parameter) == {name for name, _ in base.named_parameters()}
    assert probe.recording.tasks()["steps"].tolist() == [STEPS] * (ITERATIONS * TASKS)
