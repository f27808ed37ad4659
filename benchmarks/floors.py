"""The least that watchers of different kinds cost: recorders written for the benchmark's own loops.

Nothing of divergence_probe runs in them. Each is a context manager that takes the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import higher
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode

_flatten = torch._C._nn.flatten_dense_tensors
_STEPS = 5


class PassingOn(TorchFunctionMode):
    """Sees every operation and does nothing: the least that seeing them costs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass the call on."""
        return func(*args, **(kwargs or {}))


@contextmanager
def norms_only(net: nn.Module) -> Iterator[None]:
    """Keep each step's parameters and gradients, and take their norms 32 steps at a time."""
    optimizer = higher.optim.DifferentiableOptimizer
    original = optimizer.step
    kept: list[Tensor] = []

    def step(self: Any, loss: Tensor, **kwargs: Any) -> Any:
        seen: list[Tensor] = []

        def read(gradients: list[Tensor]) -> list[Tensor]:
            seen.extend(gradients)
            return gradients

        result = original(self, loss, grad_callback=read, **kwargs)
        kept.extend(tensor.detach() for tensor in (*result, *seen))
        if len(kept) >= 64 * len(seen):
            torch.stack(torch._foreach_norm(kept)).tolist()
            kept.clear()
        return result

    optimizer.step = step
    try:
        yield
    finally:
        optimizer.step = original


@contextmanager
def copies_only(net: nn.Module) -> Iterator[None]:
    """Copy each step's parameters and gradients where they are taken, and take norms as above."""
    original = torch.autograd.grad
    kept: list[Tensor] = []

    def grad(outputs: Any, inputs: Any, **kwargs: Any) -> Any:
        gradients = original(outputs, inputs, **kwargs)
        with torch.no_grad():
            kept.append(_flatten([*inputs, *gradients]))
            if len(kept) >= 32:
                sizes = [tensor.numel() for tensor in (*inputs, *gradients)]
                parts = torch.split(torch.stack(kept), sizes, dim=1)
                torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts]).tolist()
                kept.clear()
        return gradients

    torch.autograd.grad = grad
    try:
        yield
    finally:
        torch.autograd.grad = original


class _Numbers:
    """Takes the numbers of a recording's inner and outer steps, 128 rows at a time."""

    def __init__(self, net: nn.Module) -> None:
        self._sizes = [parameter.numel() for parameter in net.parameters()]
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.notes: list[tuple[int, float]] = []

    def row(self, before: Tensor, after: Tensor, gradient: Tensor) -> None:
        """One step, all its parameters in one vector each."""
        self.rows.append((before, after, gradient))
        if len(self.rows) >= 128:
            self.take()

    def take(self) -> None:
        """Norms before and after, of updates and gradients, and the slopes along each step."""
        before, after, gradient = map(torch.stack, zip(*self.rows, strict=True))
        update = after - before
        for values in (before, after, gradient, update):
            parts = torch.split(values, self._sizes, dim=1)
            torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts]).numpy()
        pairs = zip(
            torch.split(gradient, self._sizes, dim=1),
            torch.split(update, self._sizes, dim=1),
            strict=True,
        )
        torch.stack([torch.linalg.vecdot(g, u) for g, u in pairs]).numpy()
        torch.linalg.vecdot(gradient[1:], update[:-1]).numpy()
        self.rows.clear()
        self.notes.clear()


class _Hearing(TorchFunctionMode):
    """On for a task's last update: no later gradient shows what that makes."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self._results: list[Any] = []
        self._parameters = parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the results of the first operations, a product and a difference a parameter."""
        result = func(*args, **(kwargs or {}))
        if len(self._results) < 2 * self._parameters:
            self._results.append(result.detach())
        return result

    def updated(self) -> list[Tensor]:
        """What the update made."""
        return self._results[1::2]


@contextmanager
def tailored(net: nn.Module) -> Iterator[None]:
    """Record by hand what a recording of ``by_hand`` holds: no more could be left out.

    Each step's weights, gradients, loss and line, the last update, the query's loss, the outer
    step, and all their numbers. What it need not do, for it is written for that loop: find out that
    there is a loop, how its updates are made, where its tasks begin and end, what its parameters
    are called, whether anything is out of order; write, and judge.
    """
    autograd_grad, backward = torch.autograd.grad, torch.Tensor.backward
    numbers, width = _Numbers(net), len(list(net.parameters()))
    copied: list[Tensor] = []
    hearing: list[_Hearing] = []
    outer: list[Tensor] = []

    def grad(outputs: Any, inputs: Any, **kwargs: Any) -> Any:
        gradients = autograd_grad(outputs, inputs, **kwargs)
        with torch.no_grad():
            copied.append(_flatten([*inputs, *gradients]))
        numbers.notes.append((sys._getframe(1).f_lineno, outputs.item()))
        if len(copied) == _STEPS:
            hearing.append(_Hearing(width))
            hearing[0].__enter__()
        return gradients

    def query(self: Tensor, **kwargs: Any) -> None:
        heard = hearing.pop()
        heard.__exit__(None, None, None)
        backward(self, **kwargs)
        numbers.notes.append((sys._getframe(1).f_lineno, self.item()))
        with torch.no_grad():
            starts, slopes = zip(*(both.chunk(2) for both in copied), strict=True)
            ends = [*starts[1:], _flatten(heard.updated())]
        for step in zip(starts, ends, slopes, strict=True):
            numbers.row(*step)
        copied.clear()

    def before(optimizer: Any, *_: Any) -> None:
        parameters = list(net.parameters())
        with torch.no_grad():
            outer.append(_flatten([*parameters, *(p.grad for p in parameters)]))

    def after(optimizer: Any, *_: Any) -> None:
        with torch.no_grad():
            start, slope = outer.pop().chunk(2)
            numbers.row(start, _flatten(list(net.parameters())), slope)

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    torch.autograd.grad, torch.Tensor.backward = grad, query
    try:
        yield
    finally:
        torch.autograd.grad, torch.Tensor.backward = autograd_grad, backward
        for hook in hooks:
            hook.remove()
