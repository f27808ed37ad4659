"""Whether a task's first update carries on where the task before it stopped: its velocity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.capture import Row
from divergence_probe.observe.norms import STACKED_ELEMENTS, to_numpy
from divergence_probe.record.schema import Array

# What rounding leaves of an update across its gradient is below this part of it.
_WORTH = 1e-2
# The same of the other velocity's square, which double precision has to hold.
_ROUNDING = 1e-10
# Rows at once: what is stacked should stay in the caches.
_AT_ONCE = 16

_Vectors = tuple[Tensor, Tensor, Tensor]


def carried_velocities(rows: Sequence[Row]) -> Array:
    """How far the part of a first update across its gradient points along the task before's last.

    Momentum adds a multiple of the velocity to the gradient, so what is left of the update after
    its gradient is projected out is parallel to what is left of the velocity.

    Returns:
        ``[len(rows)]`` cosines; nan where there is nothing left worth looking at.
    """
    result = np.full(len(rows), np.nan)
    asked = [
        i
        for i, row in enumerate(rows)
        if row.preceding is not None and row.width == row.preceding.width == 1
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
    totals = np.zeros((len(rows), 6))
    for parameter in range(len(rows[0].before)):
        found: dict[tuple[object, ...], list[tuple[int, _Vectors]]] = {}
        for i, (u, v, g) in _vectors(rows, parameter):
            # Large ones by themselves: stacking would move more memory than it saves calls.
            alone = i if u.numel() > STACKED_ELEMENTS else -1
            found.setdefault((u.numel(), u.device, alone), []).append((i, (u, v, g)))
        for members in found.values():
            vectors = [vector for _, vector in members]
            # [R, 3, n] x [R, n, 3]: all six inner products at once, in double precision.
            stacked = torch.stack([torch.stack(vector) for vector in vectors]).double()
            sums = to_numpy(stacked @ stacked.mT)
            totals[[i for i, _ in members]] += sums[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
    return totals


def _vectors(rows: Sequence[Row], parameter: int) -> Iterator[tuple[int, _Vectors]]:
    """Flat update, preceding update and gradient of the rows that have all three."""
    for i, row in enumerate(rows):
        assert row.preceding is not None
        u, v = _update(row, parameter), _update(row.preceding, parameter)
        g = row.gradients[parameter]
        if u is not None and v is not None and g is not None and not g.is_sparse:
            yield i, (u.reshape(-1), v.reshape(-1), g.reshape(-1))


def _update(row: Row, parameter: int) -> Tensor | None:
    before, after = row.before[parameter], row.after[parameter]
    if before is None or after is None or before.shape != after.shape:
        return None
    return after - before
