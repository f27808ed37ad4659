"""Why an update that was made changed no weight: it was zero, or it was rounded away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from divergence_probe.observe.at_hand import waits_for_nothing
from divergence_probe.observe.operations import Operation
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.snapshot import shapes_of
from divergence_probe.observe.tensors import batched, plain
from divergence_probe.record.schema import FLAGS

_STILL = FLAGS["rounded"] | FLAGS["zero"]


def note_standstill(
    pending: Pending,
    indices: frozenset[int],
    result: Any,
    operation: Operation,
    steps: Sequence[Tensor],
    rates: Iterable[float],
) -> None:
    """Look at an operation that brought inputs and gradients together: it may have changed nothing.

    Asked of the first input that has a gradient, so that a loop that moves pays for one
    comparison; of the others once that one stood still. Where a device would be waited for, only a
    rate of zero tells.

    Args:
        pending: the gradient.
        indices: which inputs.
        result: what came out.
        operation: what was done.
        steps: the tensors made of gradients that went in.
        rates: the numbers that went in, as far as they may be rates.
    """
    if not indices or not isinstance(result, Tensor):
        return
    if operation.overwrites or operation.reshapes or operation.converts or operation.detaches:
        return  # (only hands on what an earlier operation made)
    if not pending.flags & _STILL and _first(pending) not in indices:
        return
    after = batched(result, pending.width).detach()
    no_rate = any(rate == 0 for rate in rates)
    if not waits_for_nothing(after):
        pending.flags |= FLAGS["zero"] if no_rate else 0
        return
    if not _unchanged(pending, indices, after):
        return
    zero = no_rate or not any(bool(plain(t).any()) for t in steps)
    pending.flags |= FLAGS["zero" if zero else "rounded"]


def settle_standstill(pending: Pending, values: Sequence[Tensor | None]) -> None:
    """The update is complete: keep what was noted of it only where not one input moved."""
    if not pending.flags & _STILL:
        return
    still = all(
        after is not None and (not waits_for_nothing(after) or _same(before, after))
        for before, after in zip(pending.before, values, strict=True)
    )
    if not still:
        pending.flags &= ~_STILL
        return
    if pending.flags & FLAGS["rounded"]:
        pending.flags &= ~FLAGS["zero"]
    pending.learned.confirmed = 0  # what stands still is looked at every time


def _unchanged(pending: Pending, indices: frozenset[int], after: Tensor) -> bool:
    """Whether a result is what one of the inputs was, or all of them in one vector."""
    befores = [pending.before[index] for index in sorted(indices)]
    if len(befores) > 1 and after.dim() == 1 and after.numel() == sum(b.numel() for b in befores):
        return torch.equal(torch.cat([before.reshape(-1) for before in befores]), after)
    return any(_same(before, after) for before in befores)


def _first(pending: Pending) -> int:
    shapes = shapes_of(pending.gradients)
    return next((index for index, shape in enumerate(shapes) if shape is not None), -1)


def _same(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and torch.equal(before, after)
