"""The numbers of a large model's inner steps: one row after another, one parameter after another.

Such a model's cost is memory: what is read of it once is looked at in every way while it is in the
caches. Inner products are the quickest way to do that, and the most exact. Weights that are one
step's result and the next one's start (the same object) are looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from divergence_probe.observe.capture import Row
from divergence_probe.observe.snapshot import Snapshot, Values
from divergence_probe.observe.step_vectors import VectorNumbers

_KINDS = frozenset((torch.float32, torch.float64))
# Up to so many elements numpy is quicker: what a call costs is all there is to an inner product.
_SMALL = 4096

#: One parameter's part of a vector: both kinds have the operations used here, by the same names.
_Piece = Any


def measure_pieces(
    rows: Sequence[Row], later: Sequence[int], earlier: Sequence[int]
) -> VectorNumbers | None:
    """Measure ``rows`` of one layout and width 1; None where that cannot be done this way.

    ``later`` and ``earlier`` are positions of steps that follow on one another.

    It cannot be done where a set was not copied as a whole, is of half precision or on another
    device, and where a square overflows: then each parameter is looked at by itself.
    """
    pieces = _Pieces.of([s for row in rows for s in (row.before, row.after, row.gradients)])
    if pieces is None:
        return None
    following = dict(zip(earlier, later, strict=True))
    with np.errstate(all="ignore"):
        numbers = [
            pieces.look_at(row, rows[following[i]] if i in following else row)
            for i, row in enumerate(rows)
        ]
    table = np.array(numbers)
    if np.isinf(table).any():
        return None
    names = ("norm_before", "norm_after", "update_norm", "gradient_norm")
    columns = {name: np.sqrt(table[..., k]) for k, name in enumerate(names)}
    return VectorNumbers(columns, table[..., 4], table[list(earlier), :, 5].sum(-1))


class _Pieces:
    """Parameters of sets that are one vector each.

    Args:
        sizes: how many elements each parameter has.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._pieces: dict[int, list[_Piece]] = {}
        self._squares: dict[int, list[float]] = {}

    @classmethod
    def of(cls, sets: Sequence[Values]) -> _Pieces | None:
        """For sets that are alike; None where some are not, or not vectors on the CPU."""
        first = sets[0] if sets else None
        if not isinstance(first, Snapshot) or not first.store.is_cpu:
            return None
        kind = first.store.dtype
        alike = kind in _KINDS and all(
            isinstance(s, Snapshot) and s.shapes == first.shapes and s.store.dtype is kind
            for s in sets
        )
        return cls([shape.numel() for shape in first.shapes]) if alike else None

    def look_at(self, row: Row, following: Row) -> list[tuple[float, ...]]:
        """Six inner products a parameter.

        Of the weights before with themselves, those after, the update, the gradient; and of the
        update with the gradient, and with the following step's.
        """
        found: list[tuple[float, ...]] = []
        starts, ends, slopes = (self._of(s) for s in (row.before, row.after, row.gradients))
        squares = self._squares.pop(id(row.before), None) or [s.dot(s).item() for s in starts]
        reached = self._squares[id(row.after)] = []
        for start, end, slope, next_slope, square in zip(
            starts, ends, slopes, self._of(following.gradients), squares, strict=True
        ):
            update, after = end - start, end.dot(end).item()
            reached.append(after)
            found.append(
                (
                    square,
                    after,
                    update.dot(update).item(),
                    slope.dot(slope).item(),
                    slope.dot(update).item(),
                    next_slope.dot(update).item(),
                )
            )
        return found

    def _of(self, values: Values) -> list[_Piece]:
        known = self._pieces.get(id(values))
        if known is None:
            assert isinstance(values, Snapshot)
            pieces = torch.split(values.vector, self._sizes)
            known = [piece if len(piece) > _SMALL else piece.numpy() for piece in pieces]
            self._pieces[id(values)] = known
        return known
