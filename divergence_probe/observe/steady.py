"""The middle of a task whose loop is known: a gradient that can only be the next step's.

In a loop of five steps, four gradients of five are of this kind, so they are asked the least that
tells them apart. Whatever is not exactly as expected goes the long way, which asks everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from divergence_probe.observe.pending import Pending
from divergence_probe.observe.snapshot import is_empty, shapes_of
from divergence_probe.observe.tensors import IDENTITIES


def is_next_step(
    pending: Pending, site: int, function: str, loss: Tensor | None, inputs: Sequence[Tensor]
) -> bool:
    """Whether a gradient at ``site`` is taken of what the update after ``pending`` made.

    True only where nothing was followed because the loop's course is known, and the inputs are new
    tensors, made by operations, of the shapes the last gradient was taken of.

    Args:
        pending: the gradient before.
        site: number of the line of the one about to be taken.
        function: how it is taken.
        loss: what it is taken of; None where that is still to be computed.
        inputs: what it is taken with respect to; of no transform.
    """
    if pending.site != site or pending.function != function or pending.width > 1:
        return False
    if pending.candidates or pending.followed or not pending.learned.is_known_by_heart:
        return False
    if loss is not None and pending.loss_of is not None and pending.loss_of() is loss:
        return False
    shapes = shapes_of(pending.before)
    if len(inputs) != len(shapes) or is_empty(pending.gradients):
        return False
    if not inputs or inputs[0] is pending.inputs[0]():
        return False
    for tensor, shape in zip(inputs, shapes, strict=True):
        if type(tensor) is not Tensor or tensor.grad_fn is None or tensor.shape != shape:
            return False
    return inputs[0].grad_fn.name() not in IDENTITIES  # type: ignore[union-attr]
