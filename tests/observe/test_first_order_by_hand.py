"""Outer steps by hand with the gradient of the adapted weights: first order MAML."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import divergence_probe

from .test_bases import (
    EXACT,
    ITERATIONS,
    RATE,
    STEPS,
    TASKS,
    Result,
    batch,
    clones_in_an_optimizer,
    clones_in_place,
    clones_replaced,
    counted,
    deep_copy,
    gradients,
    network,
)


@pytest.fixture(autouse=True)
def _alone() -> None:
    gc.collect()


def made_anew(base: nn.Module) -> Result:
    (x, y), fast = batch(), list(base.parameters())
    for _ in range(STEPS):
        grads = gradients(fast, x, y)
        fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
    return gradients(fast, x, y)


def as_data(parameter: Tensor, gradient: Tensor) -> None:
    parameter.data -= 0.01 * gradient


def in_place(parameter: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        parameter -= 0.01 * gradient


def added(parameter: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        parameter.add_(gradient, alpha=-0.01)


Task, Move = Callable[[nn.Module], Result], Callable[[Tensor, Tensor], None]


def train(task: Task, move: Move, tasks: int) -> divergence_probe.Probe:
    base = network()
    with divergence_probe.attach() as probe:
        for _ in range(ITERATIONS):
            results = [task(base) for _ in range(tasks)]
            for parameter, *grads in zip(base.parameters(), *results, strict=True):
                move(parameter, torch.stack(grads).mean(0))
    return probe


@pytest.mark.parametrize("move", [as_data, in_place, added])
@pytest.mark.parametrize("task", [deep_copy, clones_replaced, clones_in_place, made_anew])
def test_the_gradient_of_the_adapted_weights_moves_the_base(task: Task, move: Move) -> None:
    probe = train(task, move, TASKS)

    assert counted(probe) == EXACT
    assert not probe.diagnosis.findings
    steps = probe.recording.steps()
    outer = steps[steps.phase == "outer"]
    assert list(dict.fromkeys(outer.parameter)) == [n for n, _ in network().named_parameters()]
    assert (outer.gradient_norm.isna() | (outer.gradient_norm < 0)).all()  # of each task's own
    assert {site.rpartition(":")[0] for site in outer.site} == {__file__}


def test_the_move_is_recorded_where_the_base_was_known_before() -> None:
    probe = train(made_anew, in_place, TASKS)
    steps = probe.recording.steps()

    assert (steps[steps.phase == "outer"].update_norm > 0).all()


@pytest.mark.parametrize(
    "task", [deep_copy, clones_replaced, clones_in_place, clones_in_an_optimizer, made_anew]
)
def test_a_query_s_gradient_that_leaves_torch_is_no_step(task: Task) -> None:
    """As where it is sent to another process, and comes back as numbers."""
    base = network()
    outer = torch.optim.SGD(base.parameters(), lr=0.01)
    with divergence_probe.attach() as probe:
        for _ in range(ITERATIONS):
            sent = [[gradient.tolist() for gradient in task(base)] for _ in range(TASKS)]
            for parameter, *grads in zip(base.parameters(), *sent, strict=True):
                parameter.grad = torch.tensor(grads).mean(0)
            outer.step()

    assert counted(probe) == EXACT
    assert probe.diagnosis.summary.incomplete == ()


def test_steps_outside_of_torch_are_steps() -> None:
    """The look-alike: where the updates themselves are made of numbers."""
    base = network()
    with divergence_probe.attach() as probe:
        for _ in range(ITERATIONS):
            (x, y), fast = batch(), list(base.parameters())
            for _ in range(STEPS):
                both = zip(fast, gradients(fast, x, y), strict=True)
                moved = [weight.detach().numpy() - RATE * g.numpy() for weight, g in both]
                fast = [torch.tensor(value, requires_grad=True) for value in moved]

    assert counted(probe) == (ITERATIONS, ITERATIONS * STEPS, 0)
    assert "left torch" in probe.diagnosis.summary.incomplete[0]


def test_one_task_an_outer_step() -> None:
    """The first copy's task is an inner loop as soon as what it gives moves the original."""
    assert counted(train(deep_copy, as_data, 1)) == (ITERATIONS, ITERATIONS * STEPS, ITERATIONS)


def test_a_teacher_that_follows_its_student_takes_no_outer_step() -> None:
    """The look-alike: the copy is trained, and the original moves a little towards it each time."""
    teacher = network()
    student = copy.deepcopy(teacher)
    with divergence_probe.attach() as probe:
        for _ in range(8):
            x, y = batch()
            own = list(student.parameters())
            grads = torch.autograd.grad(F.mse_loss(student(x), y), own)
            with torch.no_grad():
                for parameter, gradient, slow in zip(own, grads, teacher.parameters(), strict=True):
                    parameter -= RATE * gradient
                    slow.lerp_(parameter, 0.1)

    assert counted(probe) == (0, 0, 0)


def test_a_replica_that_is_not_adapted_is_no_inner_loop() -> None:
    """The look-alike: gradients are taken of a copy of the weights they are for."""
    net = network()
    with divergence_probe.attach() as probe:
        for _ in range(8):
            replica, (x, y) = copy.deepcopy(net), batch()
            grads = torch.autograd.grad(F.mse_loss(replica(x), y), list(replica.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), grads, strict=True):
                    parameter -= RATE * gradient

    assert counted(probe) == (0, 0, 0)


def test_gradients_collected_for_an_optimizer_are_its_own() -> None:
    """The look-alike: the gradients go into the base's ``.grad``, and an optimizer steps."""
    base = network()
    outer = torch.optim.SGD(base.parameters(), lr=0.01)
    with divergence_probe.attach() as probe:
        for _ in range(ITERATIONS):
            outer.zero_grad(set_to_none=False)
            for _ in range(TASKS):
                for parameter, gradient in zip(base.parameters(), made_anew(base), strict=True):
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad.add_(gradient)
            outer.step()

    assert counted(probe) == EXACT
