"""Two optimizers of the same weights, in turn: the inner one adapts them, the outer one moves them.

First-order MAML and Reptile need no copy of the model: adapt it, put the weights back, then step
with a gradient that was taken elsewhere (of the query at the adapted weights, or the way back from
them). An optimizer of an ordinary loop steps with the gradient of the very weights it moves.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from divergence_probe.observe.at_hand import Mark, are_same, is_at_hand, mark_of, worth_a_wait
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import plain


@dataclass(slots=True)
class Point:
    """Where weights were when a gradient was taken, told by what costs nothing to keep.

    Attributes:
        marks: theirs, by identity.
        sample: one weight and its first value, for ``.data`` is written to without being counted;
            None where reading it would wait for a device.
    """

    marks: dict[int, Mark]
    sample: tuple[weakref.ref[Tensor], float] | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Point:
        """Where ``tensors`` are now."""
        last = next((t for t in reversed(tensors) if t.grad is not None), None)
        sample = None
        if last is not None and last.numel() and is_at_hand(last):
            sample = weakref.ref(last), _first(last)
        return cls({id(tensor): mark_of(tensor) for tensor in tensors}, sample)

    def was_left(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of ``tensors`` has been written to since."""
        if self.sample is not None:
            sampled = self.sample[0]()
            if sampled is not None and _first(sampled) != self.sample[1]:
                return True
        return any(id(t) in self.marks and self.marks[id(t)] != mark_of(t) for t in tensors)


class InTurn:
    """Tells the outer of two optimizers that move the same weights."""

    def __init__(self) -> None:
        self._outer: weakref.WeakKeyDictionary[Any, weakref.WeakSet[KnownModel]] = (
            weakref.WeakKeyDictionary()
        )
        #: Whether any weights that are no copies were adapted by an optimizer.
        self.adapted = False
        #: Models that such an optimizer has moved: what is adapted of them in place is a task.
        self.moved: weakref.WeakSet[KnownModel] = weakref.WeakSet()

    def note_outer(self, optimizer: Any, known: KnownModel) -> None:
        """An optimizer was seen to take an outer step of a model: it is its outer one, for good."""
        self._outer.setdefault(optimizer, weakref.WeakSet()).add(known)

    def was_outer(self, optimizer: Any, known: KnownModel) -> bool:
        """Whether it was."""
        outer = self._outer.get(optimizer)
        return outer is not None and known in outer

    def is_outer(
        self,
        optimizer: Any,
        task: Task,
        parameters: Sequence[Tensor],
        pending: Pending | None,
        adapts: bool,
    ) -> bool:
        """Whether an optimizer's step is the outer one of weights that others adapt.

        Args:
            optimizer: it is about to step.
            task: the latest in which another one adapted them.
            parameters: what it moves.
            pending: the backward it acts on; None where its gradients were put there by hand.
            adapts: whether it adapts them, too: then it is not the outer one for good.
        """
        if not adapts and self.was_outer(optimizer, task.known):
            return True
        if pending is None:
            elsewhere = any(parameter.grad is not None for parameter in parameters)
        else:
            elsewhere = _was_taken_elsewhere(pending, parameters)
        if not elsewhere or not _is_back(task, parameters):
            return False
        if not adapts:
            self.note_outer(optimizer, task.known)
        self.moved.add(task.known)
        return True


def _was_taken_elsewhere(pending: Pending, parameters: Sequence[Tensor]) -> bool:
    """Whether any of ``parameters`` has been written to since a gradient was taken."""
    if pending.point is not None:
        return pending.point.was_left(parameters)
    # (the gradients of a ``grad()``, handed on: what it was taken of was kept)
    own = {id(parameter) for parameter in parameters}
    return any(
        tensor is not None and id(tensor) in own and not are_same(tensor, value, worth_a_wait)
        for tensor, value in zip([r() for r in pending.inputs], pending.before, strict=True)
    )


def _is_back(task: Task, parameters: Sequence[Tensor]) -> bool:
    """Whether a task's own weights are these, and were put back to where it began.

    Where looking would be waiting for a device: whether they were written to since its last step.
    """
    if task.first is None or task.adapted is None:
        return False
    places = task.places()
    found = [(p, places[id(p)]) for p in parameters if id(p) in places]
    if not found:
        return False
    if not all(worth_a_wait(parameter) for parameter, _ in found):
        return any(mark_of(p) != task.marks.get(place) for p, place in found)
    started, ended = task.first.before, task.adapted
    back = all(are_same(p, started[place], worth_a_wait) for p, place in found)
    return back and not all(are_same(p, ended[place], worth_a_wait) for p, place in found)


def _first(tensor: Tensor) -> float:
    value = plain(tensor).detach()
    return float(value[(0,) * value.dim()])
