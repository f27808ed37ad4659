"""The least that watchers of different kinds cost: recorders written for the benchmark's own loops.

Each is a context manager that takes the model. Nothing of divergence_probe runs in them, but in
those :func:`in_full`: what these note is measured, written and judged by it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode

import divergence_probe
from divergence_probe.observe.capture import NO_FORWARDS, Forwards
from divergence_probe.observe.observer import Observer
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import Snapshot

_flatten = torch._C._nn.flatten_dense_tensors
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
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
        with _BelowAutograd():
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
    """Takes the numbers of a recording's inner and outer steps, up to 128 rows at a time."""

    def __init__(self, net: nn.Module) -> None:
        self._sizes = [parameter.numel() for parameter in net.parameters()]
        self._at_once = min(max(2**19 // sum(self._sizes), 6), 128)
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.notes: list[tuple[int, float]] = []
        self.normalizations: list[tuple[Tensor, Tensor, bool, int]] = []

    def row(self, before: Tensor, after: Tensor, gradient: Tensor) -> None:
        """One step, all its parameters in one vector each."""
        self.rows.append((before, after, gradient))
        if len(self.rows) >= self._at_once:
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
        if self.normalizations:
            self._take_statistics()
        self.rows.clear()
        self.notes.clear()

    def _take_statistics(self) -> None:
        """How far running statistics are from their batch's, and how far they moved."""
        starts, ends, *_ = zip(*self.normalizations, strict=True)
        before, after = (torch.stack(t).view(len(t), 2, -1).double() for t in (starts, ends))
        batch = (after - 0.9 * before) / 0.1
        deviation = batch[:, 1].clamp_min(1e-12).sqrt()
        distance = ((before[:, 0] - batch[:, 0]) / deviation).square().mean(-1).sqrt()
        drift = ((after[:, 0] - before[:, 0]) / deviation).square().mean(-1).sqrt()
        ratio = (before[:, 1] / batch[:, 1]).log().mean(-1)
        norms = (before[:, 0].norm(dim=-1), after[:, 0].norm(dim=-1))
        means = (before[:, 1].mean(-1), after[:, 1].mean(-1))
        torch.stack((distance, drift, ratio, *norms, *means)).numpy()
        self.normalizations.clear()


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


class _Recorder:
    """Records what a recording of the benchmark's loops holds, told where everything happens.

    Each step's weights, gradients, loss and line, the last update, the query's loss, the outer
    step, and all their numbers: no more could be left out. What it need not do, for it is written
    for these loops: find out that there is a loop, how its updates are made, where its tasks begin
    and end, what its parameters are called, whether anything is out of order; write, and judge.
    """

    def __init__(self, net: nn.Module) -> None:
        self._parameters = list(net.parameters())
        self._numbers = _Numbers(net)
        self._copied: list[Tensor] = []
        self._ends: list[Tensor] = []
        self._hearing: list[_Hearing] = []
        self._outer: list[Tensor] = []
        self._notes: list[tuple[int, float]] = []

    def step(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor], loss: float) -> None:
        """A gradient was taken, of ``loss`` (a number), with respect to ``inputs``."""
        with _BelowAutograd():
            self._copied.append(_flatten([*inputs, *gradients]))
        self._notes.append((sys._getframe(2).f_lineno, loss))

    def batch_norm(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Copies running statistics before and after each call."""

        def batch_norm(data: Tensor, mean: Tensor, variance: Tensor, *args: Any) -> Tensor:
            before = torch.cat((mean, variance))
            result = original(data, mean, variance, *args)
            after = torch.cat((mean, variance))
            self._numbers.normalizations.append((before, after, bool(args[2]), data.numel()))
            return result

        return batch_norm

    def hear_last(self) -> None:
        """Hear the last update of a task: no later gradient shows what it makes."""
        if len(self._copied) == _STEPS:
            self._hearing.append(_Hearing(len(self._parameters)))
            self._hearing[0].__enter__()

    def ended(self, weights: Sequence[Tensor]) -> None:
        """What the last update of a task made, where that is at hand."""
        with _BelowAutograd():
            self._ends = [_flatten(list(weights))]

    def _query(self, loss: Tensor, backward: Callable[..., None], kwargs: dict[str, Any]) -> None:
        while self._hearing:
            heard = self._hearing.pop()
            heard.__exit__(None, None, None)
            self.ended(heard.updated())
        backward(loss, **kwargs)
        self._notes.append((sys._getframe(2).f_lineno, loss.item()))
        self._task_is_over(self._copied, self._ends[0], self._notes)
        self._copied, self._notes = [], []

    def _task_is_over(
        self, copied: list[Tensor], end: Tensor, notes: list[tuple[int, float]]
    ) -> None:
        """Take the numbers of a task.

        Args:
            copied: each step's weights and gradients, one after the other.
            end: the weights after the last one.
            notes: line and loss of each gradient, the query's last.
        """
        starts, slopes = zip(*(both.chunk(2) for both in copied), strict=True)
        for step in zip(starts, (*starts[1:], end), slopes, strict=True):
            self._numbers.row(*step)
        self._numbers.notes += notes

    def _before(self, *_: Any) -> None:
        with _BelowAutograd():
            self._outer.append(
                _flatten([*self._parameters, *(p.grad for p in self._parameters)])  # type: ignore[list-item]
            )

    def _after(self, *_: Any) -> None:
        with _BelowAutograd():
            end = _flatten(list(self._parameters))
        self._stepped(self._outer.pop(), end)

    def _stepped(self, copied: Tensor, end: Tensor) -> None:
        """Take the numbers of an outer step, noted as a task's steps are."""
        start, slope = copied.chunk(2)
        self._numbers.row(start, end, slope)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sees the queries' backwards and the outer steps."""
        original = torch.Tensor.backward
        hooks = (
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        )
        torch.Tensor.backward = lambda loss, **kwargs: self._query(loss, original, kwargs)
        try:
            yield
        finally:
            torch.Tensor.backward = original
            for hook in hooks:
                hook.remove()


class _RecorderInFull(_Recorder):
    """The same, but that it hands each task on to what measures, writes and judges it."""

    def __init__(self, net: nn.Module, session: Session) -> None:
        super().__init__(net)
        self._session = session
        self._known = session.models.register(net)
        self._shapes = tuple(parameter.shape for parameter in self._parameters)
        self._size = sum(parameter.numel() for parameter in self._parameters)
        self._sites: dict[int, int] = {}

    def _both(self, copied: Tensor) -> tuple[Snapshot, Snapshot]:
        size = self._size
        return Snapshot(copied, self._shapes, size), Snapshot(copied, self._shapes, size, size)

    def _site(self, line: int) -> int:
        table = self._session.sites.table
        if line not in self._sites:
            self._sites[line] = len(table)
            table.append(f"{sys.argv[0]}:{line}")
        return self._sites[line]

    def _task_is_over(
        self, copied: list[Tensor], end: Tensor, notes: list[tuple[int, float]]
    ) -> None:
        session, known = self._session, self._known
        sites = [self._site(line) for line, _ in notes]
        task = session.start_task(known, "benchmark", sites[0], base=known)
        steps = [self._both(both) for both in copied]
        ends = [*(start for start, _ in steps[1:]), Snapshot(end, self._shapes, self._size)]
        for (start, slope), after, site, (_, loss) in zip(steps, ends, sites, notes, strict=False):
            session.step(
                task,
                start,
                after,
                slope,
                loss=loss,
                learning_rate=None,
                site=site,
                forwards=NO_FORWARDS,
            )
        session.query(task, Forwards(), notes[-1][1], sites[-1])
        session.finish_task(task)

    def _stepped(self, copied: Tensor, end: Tensor) -> None:
        start, slope = self._both(copied)
        after = Snapshot(end, self._shapes, self._size)
        self._session.outer_step(
            self._known, start, after, slope, learning_rate=1e-4, site=-1, optimizer="Adam"
        )


Tailored = Callable[[_Recorder], AbstractContextManager[None]]
Watch = Callable[[nn.Module], AbstractContextManager[object]]


def alone(tailored: Tailored) -> Watch:
    """A recorder written for a loop, and nothing else."""
    return lambda net: tailored(_Recorder(net))


def in_full(tailored: Tailored) -> Watch:
    """A recorder written for a loop, whose recording is the probe's own; its instruments are out.

    (Running statistics are not handed on.)
    """

    @contextmanager
    def watch(net: nn.Module) -> Iterator[object]:
        without = mock.patch.object(Observer, "install", return_value=None)
        with (
            without,
            divergence_probe.attach(net) as probe,
            tailored(_RecorderInFull(net, probe.session)),
        ):
            yield probe

    return watch


@contextmanager
def tailored_by_hand(recorder: _Recorder) -> Iterator[None]:
    """Lets a recorder see the loop by hand."""
    original = torch.autograd.grad

    def grad(outputs: Any, inputs: Any, **kwargs: Any) -> Any:
        gradients = original(outputs, inputs, **kwargs)
        recorder.step(inputs, gradients, outputs.item())
        recorder.hear_last()
        return gradients

    torch.autograd.grad = grad
    try:
        with recorder.watching():
            yield
    finally:
        torch.autograd.grad = original


@contextmanager
def tailored_to_higher(recorder: _Recorder) -> Iterator[None]:
    """Lets a recorder see the loop with higher."""
    optimizer = higher.optim.DifferentiableOptimizer
    original, steps = optimizer.step, itertools.count(1)

    def step(self: Any, loss: Tensor, **kwargs: Any) -> Any:
        seen: list[Tensor] = []

        def read(gradients: list[Tensor]) -> list[Tensor]:
            seen.extend(gradients)
            return gradients

        before = list(self._fmodel.fast_params)
        result = original(self, loss, grad_callback=read, **kwargs)
        recorder.step(before, seen, loss.item())
        if next(steps) % _STEPS == 0:
            recorder.ended(list(result))
        return result

    optimizer.step, batch_norm = step, F.batch_norm
    F.batch_norm = recorder.batch_norm(batch_norm)
    try:
        with recorder.watching():
            yield
    finally:
        optimizer.step, F.batch_norm = original, batch_norm


@contextmanager
def tailored_to_torch_func(recorder: _Recorder) -> Iterator[None]:
    """Lets a recorder see the loop with torch.func."""
    original = eager_transforms.grad_and_value_impl

    def grad_and_value_impl(func: Any, argnums: Any, has_aux: bool, args: Any, kwargs: Any) -> Any:
        result = original(func, argnums, has_aux, args, kwargs)
        gradients, value = result
        recorder.step(list(args[0].values()), list(gradients.values()), value.item())
        recorder.hear_last()
        return result

    eager_transforms.grad_and_value_impl = grad_and_value_impl
    try:
        with recorder.watching():
            yield
    finally:
        eager_transforms.grad_and_value_impl = original
