"""Weights that are brought back after a step, but not to a start: the loop goes on.

Into bounds: so the critic of the first Wasserstein GAN stays Lipschitz (Arjovsky et al.,
Wasserstein generative adversarial networks, 2017, algorithm 1), a perturbation stays small, a
factor stays nonnegative. Told by value: each weight is what the step made of it, or at a bound that
it was beyond. Or a few here and there: see :func:`are_mostly_left`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from divergence_probe.observe.at_hand import Mark, is_at_hand, was_left_alone

# Of fewer weights any two values look like bounds.
_FEWEST = 3


def were_left_alone(
    now: Sequence[Tensor],
    marks: Sequence[Mark],
    left: Sequence[Tensor | None],
    left_marks: Sequence[Mark | None],
) -> bool:
    """Whether in-place parameters still are what their last update left, but for bounds.

    Args:
        now: their values before the next update.
        marks: their marks at that time.
        left: their values after the last update, None unknown.
        left_marks: their marks at that time, None unknown.
    """
    alone = all(map(was_left_alone, now, marks, left, left_marks))
    return alone or are_only_bounded(now, left)


def are_only_bounded(now: Sequence[Tensor], left: Sequence[Tensor | None]) -> bool:
    """Whether weights are those that a step left, but for bounds that some were beyond.

    The bounds may be one parameter's own, or those of all. Looked at only where that waits for
    nothing.

    Args:
        now: the weights before the next step.
        left: what the step before made of them, None unknown.
    """
    pairs = [(a, b) for a, b in zip(now, left, strict=True) if b is not None and a.numel()]
    if any(not is_at_hand(a) or not is_at_hand(b) or a.shape != b.shape for a, b in pairs):
        return False
    changed = [(a, b) for a, b in pairs if not torch.equal(a, b)]
    if not changed or sum(a.numel() for a, _ in pairs) < _FEWEST:
        return False
    lowest, highest = min(float(a.min()) for a, _ in pairs), max(float(a.max()) for a, _ in pairs)
    return all(_is_clamped(a, b) or _lies_between(a, b, lowest, highest) for a, b in changed)


def are_mostly_left(
    now: Sequence[Tensor], left: Sequence[Tensor | None], began: Sequence[Tensor | None]
) -> bool:
    """Whether some weights here and there are others than a step left, but none begins anew.

    So a model is kept near its source that adapts for ever (Wang et al., Continual test-time domain
    adaptation, 2022, section 3.3: stochastic restoration). Looked at only where that waits for
    nothing.

    Args:
        now: the weights before the next step.
        left: what the step before made of them, None unknown.
        began: where its task began, None unknown.
    """
    restarts = True
    for here, before, start in zip(now, left, began, strict=True):
        if before is None or start is None or not (is_at_hand(here) and is_at_hand(before)):
            return False
        if here.shape != before.shape or here.shape != start.shape:
            return False
        if 2 * int((here != before).sum()) > here.numel():
            return False
        restarts &= torch.equal(here, start)
    return not restarts


def _is_clamped(now: Tensor, left: Tensor) -> bool:
    """By bounds of its own; not a constant: weights are made as one, and may be set to it again."""
    lowest, highest = float(now.min()), float(now.max())
    return now.numel() >= _FEWEST and _lies_between(now, left, lowest, highest)


def _lies_between(now: Tensor, left: Tensor, lowest: float, highest: float) -> bool:
    return lowest < highest and torch.equal(left.clamp(lowest, highest), now)
