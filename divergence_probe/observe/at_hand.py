"""Which values may be looked at: those of an accelerator are not at hand, for a look waits for it.

All who compare weights by value ask here. What is asked in every inner step looks only at what is
at hand. Between tasks a look is worth a wait: where the weights were written to from outside, or
another optimizer takes its turn, only their values tell what a loop does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from divergence_probe.observe.tensors import address_of, changes_of

_Values = Sequence[Tensor | None]
_May = Callable[[Tensor], bool]
#: See :func:`mark_of`.
Mark = int | tuple[int, int]


def waits_for_nothing(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.is_cpu


def worth_a_wait(tensor: Tensor) -> bool:
    """Whether its values can be looked at between tasks, if need be by waiting for a device.

    Not where the user has torch tell of every wait, and not while a graph of CUDA's is captured,
    which a wait would end.
    """
    if not tensor.is_cuda:
        return not tensor.is_meta
    return not (torch.cuda.get_sync_debug_mode() or torch.cuda.is_current_stream_capturing())


def is_at_hand(tensor: Tensor, may: _May = waits_for_nothing) -> bool:
    """Whether it holds dense real numbers that ``may`` be looked at."""
    strided = tensor.layout is torch.strided and tensor.is_floating_point()
    return strided and may(tensor)


def is_number_at_hand(tensor: Tensor) -> bool:
    """Whether a plain tensor is a single real number that can be read without waiting for it."""
    return waits_for_nothing(tensor) and tensor.numel() == 1 and tensor.is_floating_point()


def are_same(left: Tensor | None, right: Tensor | None, may: _May = waits_for_nothing) -> bool:
    """Whether two tensors are seen to be equal.

    Not where one is missing, or may not be looked at.
    """
    return (
        left is not None
        and right is not None
        and left.shape == right.shape
        and left.device == right.device
        and may(left)
        and may(right)
        and torch.equal(left, right)
    )


def all_same(left: _Values, right: _Values, may: _May = waits_for_nothing) -> bool:
    """Whether two sets of as many tensors are seen to be equal, pair by pair."""
    return len(left) == len(right) and all(
        are_same(a, b, may) for a, b in zip(left, right, strict=True)
    )


def no_difference(left: _Values, right: _Values, may: _May = waits_for_nothing) -> bool:
    """The same for those of which neither is missing."""
    return all(
        are_same(a, b, may)
        for a, b in zip(left, right, strict=True)
        if a is not None and b is not None
    )  # fmt: skip


def mark_of(tensor: Tensor) -> Mark:
    """What is another one once a tensor was written to, told without a look at its values.

    Torch's own count of in-place changes leaves writes through ``.data`` out. Where values are not
    at hand it is that and where they are, for most of such writes put other memory in place.
    """
    changes = changes_of(tensor)
    return changes if waits_for_nothing(tensor) else (changes, address_of(tensor))


def was_left_alone(now: Tensor, mark: Mark, left: Tensor | None, left_mark: Mark | None) -> bool:
    """Whether an in-place parameter still is what its last update left.

    By value where that is at hand, else by its marks.

    Args:
        now: its value before the next update.
        mark: its mark at that time.
        left: its value after the last update, None unknown.
        left_mark: its mark at that time, None unknown.
    """
    if left is None:
        return True
    if not waits_for_nothing(left):
        return left_mark is None or mark == left_mark
    return is_still(now, left)


def is_still(now: Tensor, then: Tensor | None) -> bool:
    """Whether a tensor has the value it had, as far as that can be told without waiting.

    (NaN stays what it is.)
    """
    if then is None or now.dtype != then.dtype or not waits_for_nothing(then):
        return True
    return torch.equal(then, now) or bool(then.isnan().any())
