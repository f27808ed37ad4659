"""Weights that are disturbed by hand before the real step, and put back: no inner step is taken.

Sharpness-aware minimisation (Foret et al., Sharpness-aware minimization for efficiently improving
generalization, 2021, algorithm 1) goes up the gradient, takes the gradient there, goes back, and
lets an optimizer step with it. What goes up may be an inner loop too (an adversary's); then nothing
is put back before it goes on. Second-order DARTS (Liu et al., 2019, equation 8) takes a gradient on
both sides along the gradient of its virtual step, and goes back: that is no outer step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from divergence_probe.observe.at_hand import is_at_hand, worth_a_wait
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.snapshot import Values
from divergence_probe.observe.task import Task

# There and back again is two roundings of half a unit each, of either number (by the other side, of
# three).
_ROUNDINGS = 2


def goes_up(pending: Pending, values: Values) -> bool:
    """Whether an update goes up its own gradient; looked at only where that waits for nothing."""
    climb = 0.0
    for before, after, gradient in zip(pending.before, values, pending.gradients, strict=True):
        if after is None or gradient is None or not is_at_hand(gradient, worth_a_wait):
            continue
        if gradient.shape == before.shape == after.shape:
            climb += float(((after - before) * gradient).sum())
    return climb > 0


def is_undone(task: Task, parameters: Sequence[Tensor]) -> bool:
    """Whether ``parameters`` are the weights a task moved, and back where it began from.

    Args:
        task: of a single step.
        parameters: of an optimizer that is about to step.
    """
    if task.first is None:
        return False
    places = task.places()
    found = [(p, places[id(p)]) for p in parameters if id(p) in places]
    before, after = task.first.before, task.first.after
    return are_back([(p, before[place], after[place]) for p, place in found])


def are_back(moves: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> bool:
    """Whether parameters that were moved are back, but for rounding.

    Args:
        moves: each as it is now, as it was before it was moved, and as it was after.
    """
    moved = off = size = 0.0
    for parameter, before, after in moves:
        if before is None or after is None or not is_at_hand(parameter, worth_a_wait):
            return False
        unit = torch.finfo(parameter.dtype).eps
        moved += _square(after - before)
        off += _square(parameter.detach() - before)
        size += unit**2 * (_square(before) + _square(after))
    return moved > 0 and math.sqrt(off) <= _ROUNDINGS * math.sqrt(size) and off < moved


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
