"""Outer steps by hand: the user writes into (or replaces) weights that no inner loop adapts.

Two agents that look ahead at each other (LOLA), or a net trained against an unrolled one, take the
gradient of their own weights through the fast weights of a task. What they move then is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from divergence_probe.observe.at_hand import is_at_hand, is_still
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.resolution import Update
from divergence_probe.observe.snapshot import Values, gathered
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import address_of, base_of, identities, physical

# What lies between a loss and the fast weights is one forward; a larger graph is not searched.
_MOST_NODES = 4096
# Cosines to straight down from which on a way leads down, and from which on it is a plain step.
_DOWN, _STRAIGHT = 0.5, 0.999
# Agents whose outer steps come together; each one's weights are kept as they were.
_MOST_WAITING = 7


def is_one(pending: Pending, update: Update) -> bool:
    """Whether an update is an outer step: of a base in place, or of who looked ahead.

    New weights count where they are leaves (or clones of such, if only those were seen): nothing
    differentiates through an outer step.
    """
    if update.in_place:
        return pending.of_base or pending.through
    return pending.through and all(
        tensor is None or tensor.is_leaf or base_of(tensor) is not None for tensor in update.tensors
    )


def starts_from_where_it_began(pending: Pending, update: Update) -> bool:
    """Whether weights that were adapted in place were stepped from where their task began.

    First order MAML on one model, by hand: the weights are put back, and moved from there by the
    gradient that was taken where they had been adapted to. Where that is one write, its value
    tells: it is closer to the beginning, and more down the gradient from there. Looked at only
    where that waits for nothing.
    """
    home = pending.home
    if not pending.displaced or home is None or pending.learned.disturbs:
        return False
    task = home[0]
    if task.first is None or task.doubtful or (task.ended and task is pending.task):
        return False
    if all(pending.displaced.values()) and not task.anchored:
        return True
    began = gathered(task.first.before, home[1])
    from_start, from_here = _Way(), _Way()
    for start, before, after, gradient in zip(
        began, pending.before, update.values, pending.gradients, strict=False
    ):
        if start is None or after is None or gradient is None or not is_at_hand(after):
            return False
        from_start.add(after - start, gradient)
        from_here.add(after - before, gradient)
    if from_start.length >= from_here.length:
        return False
    if not task.anchored:  # no step of it was ever made without the parameters themselves
        return True
    steeper = from_start.descent > from_here.descent
    return steeper and (from_start.descent > _STRAIGHT or from_here.descent < _DOWN)


@dataclass
class _Way:
    """From one set of weights to another, beside a gradient; squared lengths, and their product."""

    length: float = 0.0
    slope: float = 0.0
    product: float = 0.0

    def add(self, way: Tensor, gradient: Tensor) -> None:
        """One parameter's part."""
        way, gradient = way.double(), gradient.double()
        self.length += float(way.square().sum())
        self.slope += float(gradient.square().sum())
        self.product += float((way * gradient).sum())

    @property
    def descent(self) -> float:
        """Cosine between the way and straight down; 0 where there is none."""
        size = math.sqrt(self.length * self.slope)
        return -self.product / size if size > 0 else 0.0


def note_through(pending: Pending, task: Task, inputs: Sequence[Tensor]) -> None:
    """Note whether the loss of a gradient was computed with a task's fast weights, by its graph.

    It leads to them, or on to what the task began from (where they are gone already), or through
    what made them (where that is gone, too: a latent that a function has returned from).

    Args:
        pending: the gradient, whose loss is still alive.
        task: which was adapted before it.
        inputs: what it was taken of. A backward may reach the task's own leaves, too; else all are
            others', or it is no step of theirs.
    """
    loss = pending.loss_of() if pending.loss_of is not None else None
    if loss is None or pending.width > 1 or task.ended or task.in_place or not task.steps:
        return  # (two nets that are trained in place, in turn, run through each other)
    made = task.inputs or task.fast
    own = [t for r in (*made, *task.origins) if r is not None and (t := r()) is not None]
    ids = set(map(id, own))
    others = [tensor for tensor in inputs if id(tensor) not in ids]
    alone = len(others) == len(inputs)
    if not others or not all(tensor.is_leaf for tensor in inputs):
        return
    if not alone and pending.function != "backward":
        return
    fast = identities(made)
    pending.through_task = reaches(
        loss.grad_fn,
        {tensor.grad_fn for tensor in own if tensor.grad_fn is not None},
        {id(tensor) for tensor in own if tensor.is_leaf and id(tensor) not in fast},
        task.made_by,
    )
    pending.through = alone and pending.through_task


def reaches(node: Any, nodes: set[Any], leaves: set[int], made_by: int = -1) -> bool:
    """Whether a graph leads from ``node`` to one of ``nodes``, to a leaf, or to a number's node.

    Args:
        node: where it begins.
        nodes: those looked for.
        leaves: identities of the leaves looked for.
        made_by: one past the number of a node that is looked for; -1 for none.
    """
    seen, level = {node}, [node]
    while level and len(seen) < _MOST_NODES:
        if any(at in nodes or id(getattr(at, "variable", None)) in leaves for at in level):
            return True
        if made_by > 0 and any(at is not None and at._sequence_nr() + 1 == made_by for at in level):
            return True
        following = {n for at in level if at is not None for n, _ in at.next_functions}
        level = list(following - seen)
        seen |= following
    return False


def waiting_with(waiting: Sequence[Pending], pending: Pending) -> list[Pending]:
    """Outer gradients whose steps were not seen yet, and one more.

    One for the same leaves: of several gradients of theirs none by itself is that of the step.
    """
    kept = [other for other in waiting[-_MOST_WAITING:] if _alive(other)]
    tensors = _alive(pending)
    same = [other for other in kept if other.reached(tensors)]
    for other in same:
        other.gradients = [None] * len(other.inputs)
    return kept if same else [*kept, pending]


def _alive(pending: Pending) -> list[Tensor]:
    """What a gradient was taken of, if all of it still lives."""
    tensors = [tensor for r in pending.inputs if (tensor := r()) is not None]
    return tensors if len(tensors) == len(pending.inputs) else []


def taken(waiting: Sequence[Pending]) -> Iterator[tuple[Pending, Update]]:
    """The steps that gradients through a task led to, seen by what became of their leaves.

    Two agents may step only when both have looked ahead, and what follows then is another's. Values
    are looked at where they are at hand.
    """
    for pending in waiting:
        tensors = _alive(pending)
        if tensors and _has_moved(pending, tensors):
            values = [physical(tensor)[0].detach().clone() for tensor in tensors]
            yield pending, Update(list(tensors), list(values), in_place=True)


def memory_of(known: KnownModel) -> dict[int, int]:
    """The positions of a model's parameters, by address."""
    own = [reference() for reference in known.parameters]
    places = {address_of(t): place for place, t in enumerate(own) if t is not None}
    return {address: place for address, place in places.items() if address}


def columns_of(pending: Pending, task: Task) -> tuple[Values, Values, int]:
    """A base written to with the gradient of ``task``'s weights: before, after, and at which line.

    What it was before is known where the task began with its very tensors.
    """
    width, written = len(task.known.layout.parameters), pending.base_written
    after = [written[place][0] if place in written else None for place in range(width)]
    began = identities(task.origins)
    own = all(id(task.known.parameters[place]()) in began for place in written)
    values: Values = task.first.before if task.first is not None and own else [None] * width
    before = [values[place] if place in written else None for place in range(width)]
    return before, after, next(iter(written.values()))[1]


def _has_moved(pending: Pending, tensors: Sequence[Tensor]) -> bool:
    """Whether any of them is seen to have another value than it had."""
    return any(
        not is_still(physical(tensor)[0], value)
        for tensor, value in zip(tensors, pending.before, strict=True)
    )
