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
from divergence_probe.observe.snapshot import MOST_TOGETHER, Snapshot, Values, shapes_of, snapshot
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
    if not sizes or len(sizes) < len(rows[0].before) or sum(sizes) > MOST_TOGETHER:
        return None
    weights = Vectors(sum(sizes))
    starts = [weights.position(row.before) for row in rows]
    ends = [weights.position(row.after) for row in rows]
    gradients = Vectors(sum(sizes), [row.gradients for row in rows])
    points, gradient = weights.stacked(), gradients.stacked()
    if points is None or gradient is None or points.dtype is not gradient.dtype:
        return None
    device, norm = points.device, torch.linalg.vector_norm
    update = points.index_select(0, torch.tensor(ends, device=device))
    update.sub_(points.index_select(0, torch.tensor(starts, device=device)))
    norms = to_numpy(
        torch.stack([norm(part, dim=1) for part in torch.split(points, sizes, 1)], dim=1)
    )
    parts = []
    for g, u in zip(torch.split(gradient, sizes, 1), torch.split(update, sizes, 1), strict=True):
        parts += [norm(g, dim=1), norm(u, dim=1), torch.linalg.vecdot(g, u)]
    table = to_numpy(torch.stack(parts, dim=1)).reshape(len(rows), len(sizes), 3)
    if np.isinf(norms).any() or np.isinf(table).any():
        return None
    columns = {
        "norm_before": norms[starts],
        "norm_after": norms[ends],
        "gradient_norm": table[:, :, 0],
        "update_norm": table[:, :, 1],
    }
    along_next = torch.linalg.vecdot(gradient[later], update[earlier])
    return VectorNumbers(columns, table[:, :, 2], to_numpy(along_next))


class Vectors:
    """Sets of tensors, each to become one row of a matrix ``[sets, width]``."""

    def __init__(self, width: int, sets: Sequence[Values] = ()) -> None:
        self._width = width
        self._sets = list(sets)
        self._positions: dict[int, int] = {}

    def position(self, values: Values) -> int:
        """The row of ``values``; the same object always has the same one."""
        position = self._positions.setdefault(id(values), len(self._sets))
        if position == len(self._sets):
            self._sets.append(values)
        return position

    def stacked(self) -> Tensor | None:
        """The matrix in at least single precision, or None where some tensor does not fit in."""
        vectors = [s.vector if isinstance(s, Snapshot) else _vector(s) for s in self._sets]
        try:  # torch itself is the quickest to tell whether they are all there and alike
            matrix = torch.stack(vectors)  # type: ignore[arg-type]
        except (TypeError, RuntimeError):
            return None
        if matrix.shape[1] != self._width or not matrix.is_floating_point():
            return None
        return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


def _vector(values: Values) -> Tensor | None:
    copied = snapshot(values, copy=False)
    return copied.vector if isinstance(copied, Snapshot) else None
