"""The numbers of a small model's inner steps: one vector a set of weights, all rows at once.

A net of a few thousand weights costs more in calls than in arithmetic, so its rows are measured
with a handful of operations on ``[rows, weights]`` and a few more for each parameter's own part.
Weights that are one step's result and the next one's start (the same object) are looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.capture import Row
from divergence_probe.observe.norms import to_numpy
from divergence_probe.observe.snapshot import Snapshot, Values, most_together, shapes_of, snapshot
from divergence_probe.record.schema import Array


@dataclass
class VectorNumbers:
    """Numbers of ``R`` rows over ``P`` parameters.

    Attributes:
        columns: ``[R, P]`` for ``norm_before``, ``norm_after``, ``update_norm``, ``gradient_norm``.
        descent: ``[R, P]`` inner products of gradient and update.
        along_next: for each pair of steps, the inner product of the later one's gradient with the
            earlier one's update.
    """

    columns: dict[str, Array]
    descent: Array
    along_next: Array


def measure_vectors(
    rows: Sequence[Row], later: Sequence[int], earlier: Sequence[int]
) -> VectorNumbers | None:
    """Measure ``rows`` of one layout and width 1; None where that cannot be done this way.

    ``later`` and ``earlier`` are positions of steps that follow on one another.

    It cannot be done where a tensor is missing, sparse, complex or an integer, where the model is
    large, and where a square overflows: then each parameter is looked at by itself.
    """
    sizes = [shape.numel() for shape in shapes_of(rows[0].before) if shape is not None]
    if not sizes or len(sizes) < len(rows[0].before):
        return None
    if sum(sizes) > most_together(_first(rows[0].before)):
        return None
    vectors = Vectors(sum(sizes))
    slopes = [vectors.position(row.gradients) for row in rows]  # first: then they are in order
    starts = [vectors.position(row.before) for row in rows]
    ends = [vectors.position(row.after) for row in rows]
    matrix = vectors.stacked()
    if matrix is None:
        return None
    update = _rows(matrix, ends) - _rows(matrix, starts)
    gradient = _rows(matrix, slopes)
    norms = to_numpy(_norms(matrix, sizes))
    update_norms = _norms(update, sizes)
    parts = zip(torch.split(gradient, sizes, 1), torch.split(update, sizes, 1), strict=True)
    along = torch.stack([torch.linalg.vecdot(g, u) for g, u in parts], dim=1)
    table = to_numpy(torch.stack((update_norms, along)))
    if np.isinf(norms).any() or np.isinf(table).any():
        return None
    columns = {
        "norm_before": norms[starts],
        "norm_after": norms[ends],
        "gradient_norm": norms[slopes],
        "update_norm": table[0],
    }
    return VectorNumbers(columns, table[1], to_numpy(_along_next(gradient, update, later, earlier)))


def _first(values: Values) -> Tensor:
    """One of a set of which none is missing."""
    first = values.store if isinstance(values, Snapshot) else values[0]
    assert first is not None
    return first


def _along_next(
    gradient: Tensor, update: Tensor, later: Sequence[int], earlier: Sequence[int]
) -> Tensor:
    if all(a == b + 1 for a, b in zip(later, earlier, strict=True)):  # no need to gather copies
        along: Tensor = torch.linalg.vecdot(gradient[1:], update[:-1])
        return along[list(earlier)]
    gathered: Tensor = torch.linalg.vecdot(gradient[later], update[earlier])
    return gathered


def _rows(matrix: Tensor, positions: list[int]) -> Tensor:
    """Rows of ``matrix``, without a copy where they are evenly spaced."""
    first, *others = positions
    spacing = others[0] - first if others else 1
    last = first + spacing * len(positions)
    if spacing > 0 and positions == list(range(first, last, spacing)):
        return matrix[first:last:spacing]
    return matrix.index_select(0, torch.tensor(positions, device=matrix.device))


def _norms(matrix: Tensor, sizes: list[int]) -> Tensor:
    """``[R, P]`` norms of each row's parts."""
    parts = torch.split(matrix, sizes, 1)
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], dim=1)


class Vectors:
    """Sets of tensors, each to become one row of a matrix ``[sets, width]``.

    Sets that share one copy lie next to each other in it already, and are put in together.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._stores: list[Tensor | None] = []
        self._rows = 0
        self._positions: dict[int, int] = {}

    def position(self, values: Values) -> int:
        """The row of ``values``; the same object always has the same one."""
        if isinstance(values, Snapshot):
            store = values.store
            first = self._positions.get(id(store))
            if first is None:
                first = self._place(id(store), store)
            return first + values.start // self._width
        known = self._positions.get(id(values))
        return known if known is not None else self._place(id(values), _vector(values))

    def _place(self, key: int, store: Tensor | None) -> int:
        position = self._positions[key] = self._rows
        sets, rest = divmod(store.numel(), self._width) if store is not None else (1, 1)
        self._stores.append(None if rest else store)
        self._rows += sets
        return position

    def stacked(self) -> Tensor | None:
        """The matrix in at least single precision, or None where some tensor does not fit in."""
        try:  # torch itself is the quickest to tell whether they are all there and alike
            matrix = torch.cat(self._stores)  # type: ignore[arg-type]
        except (TypeError, RuntimeError):
            return None
        alike = {store.dtype for store in self._stores if store is not None} == {matrix.dtype}
        if (
            matrix.numel() != self._rows * self._width
            or not matrix.is_floating_point()
            or not alike
        ):
            return None
        matrix = matrix.view(self._rows, self._width)
        return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


def _vector(values: Values) -> Tensor | None:
    copied = snapshot(values, copy=False)
    return copied.vector if isinstance(copied, Snapshot) else None
