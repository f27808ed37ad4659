"""First order MAML on one model, by hand: put back to where the task began, and stepped from there.

The gradient is that of the adapted weights. Sharpness-aware steps and dual averaging look alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import divergence_probe

ITERATIONS, TASKS, STEPS, RATE, META_RATE = 4, 2, 3, 0.1, 0.01


class Net:
    """One model, its parameters, and gradients taken with ``backward``."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        self.parameters = list(self.model.parameters())

    def loss(self) -> Tensor:
        x = torch.randn(16, 2)
        return F.mse_loss(self.model(x), torch.sin(x[:, :1] + x[:, 1:]))

    def gradients(self) -> list[Tensor]:
        self.model.zero_grad()
        self.loss().backward()
        return [parameter.grad for parameter in self.parameters]  # type: ignore[misc]

    def adapt(self) -> None:
        for _ in range(STEPS):
            for parameter, gradient in zip(self.parameters, self.gradients(), strict=True):
                parameter.data = parameter.data - RATE * gradient

    def adapt_with(self, make: type[torch.optim.Optimizer]) -> None:
        optimizer = make(self.parameters, lr=0.05)  # type: ignore[call-arg]
        for _ in range(STEPS):
            self.gradients()
            optimizer.step()

    def values(self) -> list[Tensor]:
        return [parameter.data.clone() for parameter in self.parameters]


def counted(loop: Callable[[Net], None], seed: int = 0) -> tuple[int, int, int]:
    net = Net(seed)
    with divergence_probe.attach() as probe:
        loop(net)
    assert probe.failure is None
    found = {finding.rule for finding in probe.diagnosis.findings}
    assert not found & {"BASE001", "LR003", "LR004", "MG001", "OPT001"}
    summary = probe.diagnosis.summary
    return summary.tasks, summary.inner_steps, summary.outer_steps


def replaced(parameter: Tensor, step: Tensor) -> None:
    parameter.data = parameter.data - step


def through_data(parameter: Tensor, step: Tensor) -> None:
    parameter.data.sub_(step)


def in_place(parameter: Tensor, step: Tensor) -> None:
    with torch.no_grad():
        parameter -= step


@pytest.mark.parametrize("move", [replaced, through_data, in_place])
@pytest.mark.parametrize("tasks", [1, TASKS])
def test_put_back_and_then_moved(move: Callable[[Tensor, Tensor], None], tasks: int) -> None:
    def loop(net: Net) -> None:
        for _ in range(ITERATIONS):
            total = [torch.zeros_like(parameter) for parameter in net.parameters]
            for _ in range(tasks):
                began = net.values()
                net.adapt()
                for summed, gradient in zip(total, net.gradients(), strict=True):
                    summed += gradient
                for parameter, value in zip(net.parameters, began, strict=True):
                    parameter.data = value
            for parameter, summed in zip(net.parameters, total, strict=True):
                move(parameter, META_RATE * summed)

    assert counted(loop) == (ITERATIONS * tasks, ITERATIONS * tasks * STEPS, ITERATIONS)


@pytest.mark.parametrize("by_optimizer", [False, True])
@pytest.mark.parametrize("function", ["grad", "backward"])
@pytest.mark.parametrize("tasks", [1, TASKS])
def test_put_back_by_load_state_dict(tasks: int, function: str, by_optimizer: bool) -> None:
    def loop(net: Net) -> None:
        for _ in range(ITERATIONS):
            state = copy.deepcopy(net.model.state_dict())
            total = [torch.zeros_like(parameter) for parameter in net.parameters]
            for _ in range(tasks):
                net.model.load_state_dict(state)
                net.adapt_with(torch.optim.SGD) if by_optimizer else net.adapt()
                # (At a line where an optimizer is known to step, nothing else is looked for.)
                if function == "grad":
                    found = torch.autograd.grad(net.loss(), net.parameters)
                else:
                    net.model.zero_grad()
                    net.loss().backward()
                    found = [parameter.grad for parameter in net.parameters]
                total = [a + g for a, g in zip(total, found, strict=True)]
            net.model.load_state_dict(state)
            for parameter, summed in zip(net.parameters, total, strict=True):
                in_place(parameter, META_RATE * summed)

    assert counted(loop) == (ITERATIONS * tasks, ITERATIONS * tasks * STEPS, ITERATIONS)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_moved_by_one_write_after_an_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    def loop(net: Net) -> None:
        for _ in range(ITERATIONS):
            began = net.values()
            net.adapt_with(optimizer)
            gradients = torch.autograd.grad(net.loss(), net.parameters)
            for parameter, value, gradient in zip(net.parameters, began, gradients, strict=True):
                parameter.data = value - META_RATE * gradient

    assert counted(loop) == (ITERATIONS, ITERATIONS * STEPS, ITERATIONS)


@pytest.mark.parametrize("seed", range(4))
def test_moved_by_one_write(seed: int) -> None:
    def loop(net: Net) -> None:
        for _ in range(ITERATIONS):
            began = net.values()
            net.adapt()
            net.gradients()
            for parameter, value in zip(net.parameters, began, strict=True):
                parameter.data = value - META_RATE * parameter.grad  # type: ignore[operator]

    assert counted(loop, seed) == (ITERATIONS, ITERATIONS * STEPS, ITERATIONS)


@pytest.mark.parametrize("tasks", [1, TASKS])
@pytest.mark.parametrize("seed", range(4))
def test_a_vector_that_is_loaded_for_each_task(seed: int, tasks: int) -> None:
    def loop(net: Net) -> None:
        theta = parameters_to_vector(net.parameters).detach().clone()
        for _ in range(ITERATIONS):
            total = torch.zeros_like(theta)
            for _ in range(tasks):
                vector_to_parameters(theta.clone(), net.parameters)
                net.adapt()
                total += parameters_to_vector(net.gradients())
            theta -= META_RATE * total

    # (what the last one made is never loaded)
    assert counted(loop, seed) == (
        ITERATIONS * tasks, ITERATIONS * tasks * STEPS, ITERATIONS - 1,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_a_vector_that_is_adapted_and_loaded_for_each_step(seed: int) -> None:
    def loop(net: Net) -> None:
        theta = parameters_to_vector(net.parameters).detach().clone()
        for _ in range(ITERATIONS):
            vector = theta.clone()
            for step in range(STEPS + 1):
                vector_to_parameters(vector, net.parameters)
                grads = torch.autograd.grad(net.loss(), net.parameters)
                if step < STEPS:
                    vector = vector - RATE * parameters_to_vector(grads)
            theta = theta - META_RATE * parameters_to_vector(grads)

    assert counted(loop, seed) == (ITERATIONS, ITERATIONS * STEPS, ITERATIONS - 1)


@pytest.mark.parametrize("rate", [0.1, 1.2], ids=["calm", "overshooting"])
def test_inner_steps_of_weights_kept_beside_the_model(rate: float) -> None:
    """Each is written with a value that was made without the parameter; none is an outer step."""

    def loop(net: Net) -> None:
        for _ in range(ITERATIONS):
            began = net.values()
            fast = began
            for _ in range(STEPS):
                fast = [w - rate * g for w, g in zip(fast, net.gradients(), strict=True)]
                for parameter, value in zip(net.parameters, fast, strict=True):
                    parameter.data.copy_(value)
            for parameter, value in zip(net.parameters, began, strict=True):
                parameter.data.copy_(value)

    assert counted(loop) == (ITERATIONS, ITERATIONS * STEPS, 0)


def sharpness_aware(net: Net, *, moved: bool, radius: float, rate: float) -> None:
    for _ in range(20):
        norm = sum(gradient.norm() ** 2 for gradient in net.gradients()) ** 0.5
        here = net.values()
        for parameter in net.parameters:
            assert parameter.grad is not None
            if moved:
                parameter.data.add_(parameter.grad * radius / norm)
            else:
                parameter.data = parameter.data + parameter.grad * radius / norm
        net.gradients()
        for parameter, value in zip(net.parameters, here, strict=True):
            assert parameter.grad is not None
            if moved:
                parameter.data = value
                parameter.data.sub_(rate * parameter.grad)
            else:
                parameter.data = value - rate * parameter.grad


def dual_averaging(net: Net) -> None:
    began = net.values()
    total = [torch.zeros_like(value) for value in began]
    for _ in range(30):
        for summed, gradient in zip(total, net.gradients(), strict=True):
            summed += gradient
        for parameter, value, summed in zip(net.parameters, began, total, strict=True):
            parameter.data = value - 0.05 * summed


@pytest.mark.parametrize(
    "loop",
    [
        dual_averaging,
        *(
            pytest.param(
                partial(sharpness_aware, moved=moved, radius=radius, rate=rate),
                id=f"sharpness aware, {'moved' if moved else 'replaced'}, {radius}",
            )
            for moved in (True, False)
            for radius, rate in ((0.05, 0.1), (0.3, 0.005))
        ),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_ordinary_training_from_elsewhere(loop: Callable[[Net], None], seed: int) -> None:
    assert counted(loop, seed) == (0, 0, 0)
