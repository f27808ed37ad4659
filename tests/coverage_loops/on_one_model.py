"""First order MAML on one model without any optimizer: adapted in place, put back, moved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.coverage_loops.notes import (
    NAMES,
    RATE,
    STEPS,
    TASKS,
    Net,
    Notes,
    batch,
    each,
    named,
)

ROUNDS, META_RATE = 4, 0.01


def _gradients(net: Net, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad for p in net.parameters()]  # type: ignore[misc]


def _adapt(notes: Notes, net: Net, x: Tensor, y: Tensor) -> None:
    for _ in range(STEPS):
        loss = F.mse_loss(net(x), y)
        before = notes.values(named(net))
        for p, g in each(list(net.parameters()), _gradients(net, loss)):
            p.data = p.data - RATE * g
        notes.step(loss, before, named(net))


def _outer(notes: Notes, net: Net, start: dict[str, float], move: Callable[[], object]) -> None:
    """The outer step goes from where the task began, whatever is in the weights by then."""
    notes.outer(named(net), move)
    notes.outer_steps[-1].before = start


def moved_after(notes: Notes, move: Callable[[Tensor, Tensor], None]) -> None:
    """Put back after every task, and moved by the sum of their gradients."""
    net = Net()
    notes.alive.append(net)
    for _ in range(ROUNDS):
        total = [torch.zeros_like(p) for p in net.parameters()]
        for _ in range(TASKS):
            notes.task()
            start = [p.data.clone() for p in net.parameters()]
            x, y = batch()
            _adapt(notes, net, x, y)
            for t, g in each(total, _gradients(net, F.mse_loss(net(x), y))):
                t += g
            for p, value in each(list(net.parameters()), start):
                p.data = value

        def step(total: list[Tensor] = total) -> None:
            for p, t in each(list(net.parameters()), total):
                move(p, META_RATE * t)

        notes.outer(named(net), step)


def replaced(parameter: Tensor, step: Tensor) -> None:
    """New memory."""
    parameter.data = parameter.data - step


def in_place(parameter: Tensor, step: Tensor) -> None:
    """The same memory."""
    parameter.data.sub_(step)


def one_write(notes: Notes) -> None:
    """Put back and moved at once."""
    net = Net()
    notes.alive.append(net)
    for _ in range(ROUNDS):
        notes.task()
        start = [p.data.clone() for p in net.parameters()]
        x, y = batch()
        _adapt(notes, net, x, y)
        gradients = _gradients(net, F.mse_loss(net(x), y))

        def step(start: list[Tensor] = start, gradients: list[Tensor] = gradients) -> None:
            for p, value, g in zip(net.parameters(), start, gradients, strict=True):
                p.data = value - META_RATE * g

        _outer(notes, net, notes.values(start), step)


def vector_for_each_task(notes: Notes) -> None:
    """The base is a vector; every task loads it, and adapts the model."""
    net = Net()
    notes.alive.append(net)
    theta = parameters_to_vector(net.parameters()).detach().clone()
    for _ in range(ROUNDS):
        total = torch.zeros_like(theta)
        start = notes.values(named(net))
        for _ in range(TASKS):
            notes.task()
            vector_to_parameters(theta.clone(), net.parameters())
            x, y = batch()
            _adapt(notes, net, x, y)
            total += parameters_to_vector(_gradients(net, F.mse_loss(net(x), y)))
        theta -= META_RATE * total
        _outer(notes, net, start, partial(vector_to_parameters, theta.clone(), net.parameters()))


def vector_for_each_step(notes: Notes) -> None:
    """The base is a vector, and so are the adapted weights; every gradient is of a loaded one."""
    net = Net()
    notes.alive.append(net)
    parameters = list(net.parameters())
    theta = parameters_to_vector(parameters).detach().clone()
    for _ in range(ROUNDS):
        notes.task()
        x, y = batch()
        start, vector = notes.values(dict(zip(NAMES, parameters, strict=True))), theta
        for _ in range(STEPS):
            loss, before = F.mse_loss(net(x), y), notes.values(named(net))
            gradients = torch.autograd.grad(loss, parameters)
            vector = vector - RATE * parameters_to_vector(gradients)
            vector_to_parameters(vector, parameters)
            notes.step(loss, before, named(net))
        gradients = torch.autograd.grad(F.mse_loss(net(x), y), parameters)
        theta = theta - META_RATE * parameters_to_vector(gradients)
        _outer(notes, net, start, partial(vector_to_parameters, theta, parameters))


def cells() -> list[tuple[str, str, str, Callable[[Notes], None]]]:
    """``(style, order, optimizer, loop)``."""
    return [
        (f"one model, put back, then {style}", "first", "by hand", loop)
        for style, loop in {
            "`p.data = p.data - g`": partial(moved_after, move=replaced),
            "`p.data.sub_(g)`": partial(moved_after, move=in_place),
            "`p.data = start - g`": one_write,
            "a vector loaded for each task": vector_for_each_task,
            "a vector loaded for each step": vector_for_each_step,
        }.items()
    ]
