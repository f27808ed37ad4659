"""What instruments hand to the session: references to one row's tensors, nothing computed yet."""

from __future__ import annotations

import itertools
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Number = float | Tensor | None


@dataclass(slots=True)
class NormalizationCall:
    """One forward of one normalisation layer.

    Attributes:
        module: the module it was called from, or None for a bare function call.
        weight: the affine weight that was passed, for naming bare calls, or None.
        name: dotted name of the module where it is known already.
        training: whether batch statistics were used.
        momentum: weight of the batch's statistics in the running ones, 0 to 1.
        before: running mean and variance before the call, one after the other ``[2C]``, or None.
        after: the same after the call; None where they cannot have moved.
        batch: the batch's own mean and variance ``[2C]`` where they were measured, or None.
        values: values per channel.
        batches: ``num_batches_tracked`` when the call ended; None where there is no counter.
        shared: whether the buffers are the base model's own.
        buffers: identity of the running mean, to tell layers apart; 0 for none.
        statistics: the running mean itself; None for none.
        known_as: the name that layer was given before.
        order: position among all observed forward calls.
        differentiable: whether gradients were enabled: a gradient can only come from such calls.
    """

    module: weakref.ref[torch.nn.Module] | None
    weight: weakref.ref[Tensor] | None
    training: bool
    momentum: float
    before: Tensor | None
    after: Tensor | None
    batch: Tensor | None
    values: int
    batches: int | Tensor | None
    shared: bool
    buffers: int = 0
    statistics: weakref.ref[Tensor] | None = None
    known_as: str | None = None
    name: str | None = None
    order: int = 0
    differentiable: bool = True


@dataclass(slots=True)
class DropoutCall:
    """One forward of one dropout layer: which module, and whether it dropped anything."""

    module: weakref.ref[torch.nn.Module] | None
    training: bool
    probability: float
    name: str | None = None
    order: int = 0
    differentiable: bool = True


@dataclass(slots=True)
class LossCall:
    """One scalar loss that was computed: the user's tensor by identity, and its value if known."""

    tensor: weakref.ref[Tensor]
    value: Number
    order: int


#: A number that grows with every observed forward call of the process.
next_order = itertools.count().__next__
#: Forward calls that are kept of what no gradient has been taken of.
MOST_CALLS = 4096


@dataclass(slots=True)
class Forwards:
    """What ran forward since the last gradient call, in order."""

    normalizations: list[NormalizationCall] = field(default_factory=list)
    dropouts: list[DropoutCall] = field(default_factory=list)
    losses: list[LossCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.normalizations or self.dropouts or self.losses)

    @property
    def only_a_loss(self) -> bool:
        """Whether nothing ran but what ends in a single loss (or nothing at all)."""
        return not self.normalizations and not self.dropouts and len(self.losses) <= 1

    def measurable(self) -> Forwards:
        """What a row has to keep: the losses are known by value."""
        return self if self.normalizations or self.dropouts else NO_FORWARDS

    @property
    def loss(self) -> Number:
        """The last loss computed, or None."""
        return self.losses[-1].value if self.losses else None

    def take(self) -> Forwards:
        """Everything so far; this one starts anew."""
        taken = Forwards(self.normalizations, self.dropouts, self.losses)
        self.normalizations, self.dropouts, self.losses = [], [], []
        return taken

    def split_for(self, loss: Tensor | None, foreign: Callable[[Tensor], bool]) -> Forwards:
        """Take out what can have led to ``loss``; what stays ran for another purpose.

        That is everything differentiable after the loss computed before ``loss``'s own, but for
        layers whose weight is ``foreign`` (another task's) or gone.
        """
        if self.only_a_loss:
            return self.take()
        mine = [i for i, call in enumerate(self.losses) if call.tensor() is loss]
        last = mine[-1] if mine else len(self.losses) - 1
        since = self.losses[last - 1].order if last > 0 else -1
        own = Forwards(
            [
                c
                for c in self.normalizations
                if c.order > since and c.differentiable and not _is_foreign(c, foreign)
            ],
            [c for c in self.dropouts if c.order > since and c.differentiable],
            [c for c in self.losses if c.order > since],
        )
        calls: list[NormalizationCall | DropoutCall | LossCall] = [
            *own.normalizations,
            *own.dropouts,
            *own.losses,
        ]
        taken = {call.order for call in calls}
        self.normalizations = [c for c in self.normalizations if c.order not in taken]
        self.dropouts = [c for c in self.dropouts if c.order not in taken]
        self.losses = [c for c in self.losses if c.order not in taken]
        return own

    def take_used_by(self, weights: Callable[[Tensor], bool]) -> Forwards:
        """Take everything whose weight ``weights`` accepts, or that shows none; drop the rest."""
        taken = self.take()
        taken.normalizations = [
            call
            for call in taken.normalizations
            if call.weight is None or ((w := call.weight()) is not None and weights(w))
        ]
        return taken

    def take_through(self, weights: Iterable[Tensor]) -> Forwards:
        """Take out what a gradient can have come from through one of ``weights``; the rest stays.

        (Those of an open task are foreign to a gradient of anything else: see ``split_for``.)
        """
        ids = set(map(id, weights))

        def through(call: NormalizationCall) -> bool:
            weight = call.weight() if call.weight is not None else None
            return call.differentiable and id(weight) in ids

        taken = Forwards([call for call in self.normalizations if through(call)])
        self.normalizations = [call for call in self.normalizations if not through(call)]
        return taken

    def leave_out(self, strange: Callable[[Tensor], bool]) -> None:
        """Forget forwards with ``strange`` weights, and what ran with them up to their loss."""

        def is_strange(call: NormalizationCall) -> bool:
            weight = call.weight() if call.weight is not None else None
            return weight is not None and strange(weight)

        left_out = [call.order for call in self.normalizations if is_strange(call)]
        if not left_out:
            return
        kept = [call for call in self.normalizations if not is_strange(call)]
        losses = [call.order for call in self.losses]
        forwards = {bisect_left(losses, order) for order in left_out}
        forwards -= {bisect_left(losses, c.order) for c in kept if c.weight is not None}
        self.normalizations = [c for c in kept if bisect_left(losses, c.order) not in forwards]
        self.dropouts = [c for c in self.dropouts if bisect_left(losses, c.order) not in forwards]

    def trim(self) -> None:
        """Forget the oldest of very many: an evaluation without gradients goes on for ever."""
        if len(self.normalizations) + len(self.dropouts) + len(self.losses) > MOST_CALLS:
            self.normalizations = self.normalizations[-MOST_CALLS // 4 :]
            self.dropouts = self.dropouts[-MOST_CALLS // 4 :]
            self.losses = self.losses[-MOST_CALLS // 4 :]

    def extend(self, other: Forwards) -> None:
        """Append what ran later."""
        self.normalizations += other.normalizations
        self.dropouts += other.dropouts
        self.losses += other.losses


def _is_foreign(call: NormalizationCall, foreign: Callable[[Tensor], bool]) -> bool:
    if call.weight is None:
        return False
    weight = call.weight()
    return weight is None or foreign(weight)


#: Where a row needs to keep nothing of what ran forward; shared, so never added to.
NO_FORWARDS = Forwards()


@dataclass(slots=True)
class Row:
    """One row to be: an inner step, a query, or an outer step, by reference.

    The tensors are detached and must not change until the block is closed: instruments clone what
    the user may overwrite in place. ``width`` is the number of tasks a vmapped row stands for; then
    every tensor has the task dimension first.

    Attributes:
        task: index of its (first) task.
        step: inner step within the task.
        phase: index into ``schema.PHASES``.
        layout: index of its layout.
        site: number of the user's line, -1 unknown.
        seconds: since the probe was attached.
        before: parameters before the step, or None entries where unknown.
        after: parameters after it.
        gradients: gradients that were applied.
        forwards: what ran forward for it.
        loss: the loss whose gradient was taken.
        learning_rate: the largest over the parameter groups.
        flags: ``schema.FLAGS`` bits.
        width: number of vmapped tasks, 1 without vmap.
        previous: the row of the step before in the same task, until this one is measured.
        carried: gradients that were already there before the row's own was added to them; a
            query's own.
        preceding: for a task's first row, the last row of the task before, until it is measured.
        clipped: whether its gradients were clipped, where that is read only when it is measured.
    """

    task: int
    step: int
    phase: int
    layout: int
    site: int
    seconds: float
    before: Sequence[Tensor | None]
    after: Sequence[Tensor | None]
    gradients: Sequence[Tensor | None]
    forwards: Forwards
    loss: Number = None
    learning_rate: Number = None
    flags: int = 0
    width: int = 1
    previous: Row | None = None
    carried: Sequence[Tensor] = ()
    preceding: Row | None = None
    clipped: Tensor | None = None
