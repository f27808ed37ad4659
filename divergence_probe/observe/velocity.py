"""Whether a task's first update carries on where the task before it stopped: its velocity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.capture import Row
from divergence_probe.observe.norms import STACKED_ELEMENTS, to_numpy, wide_dtype
from divergence_probe.observe.snapshot import MOST_TOGETHER, elements_of
from divergence_probe.observe.step_vectors import Vectors
from divergence_probe.record.schema import MISSING, Array, Flags

# What rounding leaves of an update across its gradient is below this part of it, where it is not
# small itself beside what single precision loses of the weights.
_WORTH = 1e-2
_LOST = 2.0**-24
# The same of the other velocity's square, which double precision has to hold.
_ROUNDING = 1e-10
# Rows at once: what is stacked should stay in the caches.
_AT_ONCE = 16


def has_another_direction(parameters: dict[str, Array]) -> Flags:
    """Whether steps went anywhere but along their gradients, from their measured numbers.

    Args:
        parameters: ``[S, P]`` columns of ``schema.PARAMETER_COLUMNS``.

    Returns:
        ``[S]``; True where the numbers do not tell.
    """
    updates, gradients = parameters["update_norm"], parameters["gradient_norm"]
    with np.errstate(all="ignore"):
        gg = gradients**2
        uu = (updates**2).sum(-1)
        ug = np.where(gg > 0, parameters["step_rate"] * gg, 0.0).sum(-1)
        along = ug**2 / gg.sum(-1)
        # Half of what is looked at below: these numbers are of single precision.
        straight = uu - along < 0.5 * _WORTH**2 * uu
        straight |= uu < (_LOST / _WORTH) ** 2 * (parameters["norm_before"] ** 2).sum(-1)
    known = ((updates != MISSING) & (gradients != MISSING)).all(-1)
    return np.asarray(~(straight & known))


def carried_velocities(rows: Sequence[Row], asked_of: Flags | None = None) -> Array:
    """How far the part of a first update across its gradient points along the task before's last.

    Momentum adds a multiple of the velocity to the gradient, so what is left of the update after
    its gradient is projected out is parallel to what is left of the velocity.

    Args:
        rows: in order of time.
        asked_of: ``[len(rows)]`` those of which it is worth finding out; all by default.

    Returns:
        ``[len(rows)]`` cosines; nan where there is nothing left worth looking at.
    """
    result = np.full(len(rows), np.nan)
    asked = [
        i
        for i, row in enumerate(rows)
        if row.preceding is not None
        and row.width == row.preceding.width == 1
        and (asked_of is None or asked_of[i])
    ]
    for few in (asked[i : i + _AT_ONCE] for i in range(0, len(asked), _AT_ONCE)):
        result[few] = _cosines(_products([rows[i] for i in few]))
    return result


def _cosines(products: Array) -> Array:
    """Cosines after projecting ``g`` out, from the sums of :func:`_products`."""
    with np.errstate(all="ignore"):
        uu, uv, ug, vv, vg, gg = products.T
        square = np.fmax(gg, 1e-60)
        across, other = uu - ug**2 / square, vv - vg**2 / square
        cosine = (uv - ug * vg / square) / np.sqrt(across * other)
        worth = (across > _WORTH**2 * uu) & (other > _ROUNDING * vv)
    return np.where(worth, cosine, np.nan)


def _products(rows: Sequence[Row]) -> Array:
    """``[R, 6]`` inner products uu, uv, ug, vv, vg, gg over all parameters.

    ``u`` is a row's update, ``v`` that of the row preceding it, ``g`` its gradient.
    """
    together = _together(rows)
    if together is not None:
        return together
    totals = np.zeros((len(rows), 6))
    for parameter in range(len(rows[0].before)):
        whole = [i for i, row in enumerate(rows) if _is_whole(row, parameter)]
        groups: dict[tuple[object, ...], list[int]] = {}
        for i in whole:
            tensor = rows[i].before[parameter]
            assert tensor is not None
            # Large ones by themselves: stacking would move more memory than it saves calls.
            alone = i if tensor.numel() > STACKED_ELEMENTS else -1
            groups.setdefault((tensor.shape, tensor.device, alone), []).append(i)
        for members in groups.values():
            totals[members] += _sums([rows[i] for i in members], parameter)
    return totals


def _together(rows: Sequence[Row]) -> Array | None:
    """The same of a small model, all parameters at once; None where that cannot be done."""
    width = elements_of(rows[0].before)
    if not 0 < width <= MOST_TOGETHER:
        return None
    vectors = Vectors(width)
    positions = [
        vectors.position(values)
        for row in rows
        if (preceding := row.preceding) is not None
        for values in (row.before, row.after, preceding.before, preceding.after, row.gradients)
    ]
    matrix = vectors.stacked()
    return (
        _inner_products(matrix[positions].view(len(rows), 5, width)) if matrix is not None else None
    )


def _sums(rows: Sequence[Row], parameter: int) -> Array:
    """One parameter's part of :func:`_products`."""
    vectors = [torch.stack(_vectors(row, parameter)).flatten(1) for row in rows]
    return _inner_products(torch.stack(vectors))


def _inner_products(vectors: Tensor) -> Array:
    """``[R, 6]`` from ``[R, 5, n]``: before, after, those of the preceding row, the gradient."""
    wide = vectors.to(wide_dtype(vectors.device))
    start, end, before, after, gradient = wide.unbind(1)
    # [R, 3, n] x [R, n, 3]: all six inner products at once, in double precision.
    stacked = torch.stack((end - start, after - before, gradient), dim=1)
    return to_numpy(stacked @ stacked.mT)[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]


def _vectors(row: Row, parameter: int) -> list[Tensor]:
    """Before and after, the same of the preceding row, and the gradient."""
    preceding = row.preceding
    assert preceding is not None
    pairs = (row.before, row.after, preceding.before, preceding.after, row.gradients)
    return [tensor for values in pairs if (tensor := values[parameter]) is not None]


def _is_whole(row: Row, parameter: int) -> bool:
    """Whether all of them are there, dense and alike."""
    vectors = _vectors(row, parameter)
    shape = vectors[0].shape if vectors else None
    alike = all(t.shape == shape and t.layout is torch.strided for t in vectors)
    return len(vectors) == 5 and alike and not any(t.is_complex() for t in vectors)
