"""Step lengths that are tried out in place: what the last of them made is the step.

A line search writes the weights, looks at the loss there and, if it is not low enough, writes them
anew from where they were, a shorter way along the same gradient. No gradient is taken in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from divergence_probe.observe.at_hand import Mark, is_at_hand, mark_of
from divergence_probe.observe.snapshot import gathered
from divergence_probe.observe.task import Task

# The sine of the angle to the gradient that rounding alone makes.
_ROUNDED = 1e-3


def took_another_length(
    task: Task, places: Sequence[int], found: Sequence[tuple[Tensor, Mark]]
) -> bool:
    """Whether a task's last step was only tried out, and taken with another length since.

    Then that is what it is recorded with.

    Args:
        task: adapts in place.
        places: positions of its weights.
        found: their values and marks now.
    """
    row, now = task.last, [value for value, _ in found]
    if row is None or task.doubtful:
        return False
    if not is_another_length(gathered(row.before, places), now, gathered(row.gradients, places)):
        return False
    after = list(row.after)
    for place, (value, mark) in zip(places, found, strict=True):
        after[place], task.marks[place] = value, mark
    row.after = after
    return True


def as_they_are(task: Task) -> tuple[list[int], list[tuple[Tensor, Mark]]]:
    """Positions, values and marks of weights that were written to since the task's last step."""
    places, found = [], []
    for place, reference in enumerate(task.fast):
        tensor = reference() if reference is not None else None
        if tensor is not None and mark_of(tensor) != task.marks.get(place, mark_of(tensor)):
            places.append(place)
            found.append((tensor.detach().clone(), mark_of(tensor)))
    return places, found


def is_another_length(
    before: Sequence[Tensor | None], now: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> bool:
    """Whether weights are now another way down the gradient of their last step, from its start.

    Looked at only where that waits for nothing.

    Args:
        before: the weights before that step, None unknown.
        now: the weights before the next gradient.
        gradients: of that step, None where a weight had none.
    """
    length = slope = product = 0.0
    for start, here, gradient in zip(before, now, gradients, strict=True):
        if start is None or not is_at_hand(here) or start.shape != here.shape:
            return False
        way = here.double() - start.double()
        length += float(way.square().sum())
        if gradient is not None:
            if gradient.is_sparse or gradient.shape != here.shape:
                return False
            slope += float(gradient.double().square().sum())
            product += float((way * gradient.double()).sum())
    if not (length > 0 and slope > 0 and product < 0):
        return False
    return 1 - product**2 / (length * slope) < _ROUNDED**2
