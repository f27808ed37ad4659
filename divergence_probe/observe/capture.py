"""What instruments hand to the session: references to the tensors of one row, nothing computed yet."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
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
        before: running mean and variance before the call ``[2, C]``, or None.
        after: the same after the call; None where they cannot have moved.
        batch: the batch's own mean and variance ``[2, C]`` where they were measured, or None.
        values: values per channel.
        batches: ``num_batches_tracked`` when the call ended; None where there is no counter.
        shared: whether the buffers are the base model's own.
        buffers: address of the running mean's storage, to tell layers apart; 0 for none.
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
    name: str | None = None


@dataclass(slots=True)
class DropoutCall:
    """One forward of one dropout layer: which module, and whether it dropped anything."""

    module: weakref.ref[torch.nn.Module] | None
    training: bool
    probability: float
    name: str | None = None


@dataclass(slots=True)
class Forwards:
    """What ran forward since the last gradient call."""

    normalizations: list[NormalizationCall] = field(default_factory=list)
    dropouts: list[DropoutCall] = field(default_factory=list)
    loss: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self.normalizations or self.dropouts) or self.loss is not None

    def take(self) -> Forwards:
        """Everything so far; this one starts anew."""
        taken = Forwards(self.normalizations, self.dropouts, self.loss)
        self.normalizations, self.dropouts, self.loss = [], [], None
        return taken

    def extend(self, other: Forwards) -> None:
        """Append what ran later."""
        self.normalizations += other.normalizations
        self.dropouts += other.dropouts
        self.loss = other.loss if other.loss is not None else self.loss


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

    def size(self) -> int:
        """Bytes it keeps alive, roughly."""
        return sum(
            tensor.numel() * tensor.element_size()
            for tensors in (self.before, self.after, self.gradients)
            for tensor in tensors
            if tensor is not None
        )
