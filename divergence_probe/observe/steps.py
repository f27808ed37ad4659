"""The numbers of inner steps, one parameter at a time over all rows of a block.

One parameter has one shape, so its tensors of a whole block stack into one: about twelve tensor
operations a parameter and block, whatever the number of rows, instead of six a row. Large tensors
are measured where they lie; stacking them would move more memory than it saves calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.capture import Row
from divergence_probe.observe.norms import STACKED_ELEMENTS, measurable, norms, to_numpy
from divergence_probe.record.schema import MISSING, PARAMETER_COLUMNS, Array


@dataclass
class StepNumbers:
    """What a block's rows of one width come to.

    Attributes:
        columns: ``[S, W, P]`` for each of ``schema.PARAMETER_COLUMNS``.
        instability: ``[S, W]`` step size x curvature along each row's previous step.
    """

    columns: dict[str, Array]
    instability: Array


def measure(rows: Sequence[Row], parameters: int, width: int) -> StepNumbers:
    """Measure ``rows`` of equal ``width``; see :class:`StepNumbers`.

    With ``g`` the gradient before a step ``u`` and ``h`` the gradient after it, the loss along the
    step is, to second order, ``g.u (1 - s/2)`` with ``s = 1 - h.u / g.u``: above 2 the step goes
    further up the far side than it came down. For gradient descent on a quadratic ``s`` is exactly
    the step size times the curvature along the gradient (Nesterov, Lectures on Convex Optimization,
    2018, section 1.2.3: gradient descent is stable below 2 / L).
    """
    shape = (len(rows), width, parameters)
    columns = {name: np.full(shape, MISSING) for name in PARAMETER_COLUMNS}
    columns["step_rate"] = np.full(shape, np.nan)
    place = {id(row): i for i, row in enumerate(rows)}
    previous = [place.get(id(row.previous), -1) if row.previous is not None else -1 for row in rows]
    slope = np.zeros((len(rows), width))  # of the loss along the row's previous step: before it,
    slope_after = np.zeros((len(rows), width))  # and after it
    for parameter in range(parameters):
        _parameter(rows, parameter, width, previous, columns, slope, slope_after)
    for i, row in enumerate(rows):
        if row.previous is not None and previous[i] < 0:  # in the block before: by itself
            slope[i], slope_after[i] = _slopes(row.previous, row, width)
    with np.errstate(all="ignore"):
        product = np.where(slope < 0, 1 - slope_after / slope, np.nan)
    return StepNumbers(columns, product)


def _parameter(
    rows: Sequence[Row],
    parameter: int,
    width: int,
    previous: Sequence[int],
    columns: dict[str, Array],
    slope: Array,
    slope_after: Array,
) -> None:
    """Fill in one parameter's column."""
    triples = [
        (row.before[parameter], row.after[parameter], row.gradients[parameter]) for row in rows
    ]
    whole = [i for i, triple in enumerate(triples) if _is_whole(triple)]
    if len(whole) < len(rows):
        rest = sorted(set(range(len(rows))) - set(whole))
        _each([triples[i] for i in rest], rest, parameter, width, columns)
    if not whole:
        return
    before, after, gradient = (_stacked([triples[i][k] for i in whole], width) for k in range(3))
    update = after - before
    numbers = [torch.linalg.vector_norm(t, dim=2) for t in (before, after, update, gradient)]
    descent = (gradient * update).sum(2)
    index = {i: k for k, i in enumerate(whole)}
    pairs = [(k, index[previous[i]], i) for k, i in enumerate(whole) if previous[i] in index]
    if pairs:
        here = gradient[[k for k, _, _ in pairs]]
        numbers.append((here * update[[j for _, j, _ in pairs]]).sum(2))
    table = to_numpy(torch.cat([*numbers[:4], descent, *numbers[4:]]))
    size = len(whole)
    for k, name in enumerate(("norm_before", "norm_after", "update_norm", "gradient_norm")):
        columns[name][whole, :, parameter] = table[k * size : (k + 1) * size]
        _check_overflow(columns[name], whole, parameter, triples, k, width)
    along, after_along = table[4 * size : 5 * size], table[5 * size :]
    with np.errstate(all="ignore"):
        square = columns["gradient_norm"][whole, :, parameter] ** 2
        columns["step_rate"][whole, :, parameter] = np.where(square > 0, -along / square, np.nan)
    if pairs:
        later = [i for _, _, i in pairs]
        slope[later] += along[[j for _, j, _ in pairs]]
        slope_after[later] += after_along


def _is_whole(triple: tuple[Tensor | None, Tensor | None, Tensor | None]) -> bool:
    """Whether before, after and gradient are all there, dense, small and alike."""
    before, after, gradient = triple
    if before is None or after is None or gradient is None:
        return False
    if before.numel() > STACKED_ELEMENTS or not before.is_floating_point():
        return False
    strided = torch.strided
    if before.layout is not strided or gradient.layout is not strided:
        return False
    return before.shape == after.shape == gradient.shape


def _stacked(tensors: Sequence[Tensor | None], width: int) -> Tensor:
    """``[R, W, n]`` in at least single precision."""
    present = [tensor for tensor in tensors if tensor is not None]
    first = present[0]
    if any(t.dtype is not first.dtype or t.device != first.device for t in present):
        present = [tensor.to(device=first.device, dtype=torch.float32) for tensor in present]
    stacked = torch.stack(present).detach().reshape(len(present), width, -1)
    return stacked.float() if stacked.dtype in (torch.float16, torch.bfloat16) else stacked


def _check_overflow(
    column: Array,
    rows: Sequence[int],
    parameter: int,
    triples: Sequence[tuple[Tensor | None, ...]],
    kind: int,
    width: int,
) -> None:
    """float32 squares overflow from 1.8e19 on: look again before calling a norm infinite."""
    if not np.isinf(column[:, :, parameter]).any():
        return
    for i in rows:
        if not np.isinf(column[i, :, parameter]).any():
            continue
        before, after, gradient = triples[i]
        assert before is not None and after is not None
        tensor = (before, after, after.double() - before.double(), gradient)[kind]
        column[i, :, parameter] = norms([tensor], width)


def _each(
    triples: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]],
    rows: Sequence[int],
    parameter: int,
    width: int,
    columns: dict[str, Array],
) -> None:
    """Rows with something missing, sparse, or too large to be worth stacking."""
    updates = [
        after - before
        if before is not None and after is not None and before.shape == after.shape
        else None
        for before, after, _ in triples
    ]
    kinds = ([t[0] for t in triples], [t[1] for t in triples], updates, [t[2] for t in triples])
    names = ("norm_before", "norm_after", "update_norm", "gradient_norm")
    for name, tensors in zip(names, kinds, strict=True):
        columns[name][rows, :, parameter] = norms(tensors, width).reshape(len(rows), width)
    rates = columns["step_rate"]
    for i, update, (_, _, gradient) in zip(rows, updates, triples, strict=True):
        if update is not None and gradient is not None and update.shape == gradient.shape:
            along = _dot(update, gradient, width)
            with np.errstate(all="ignore"):
                square = columns["gradient_norm"][i, :, parameter] ** 2
                rates[i, :, parameter] = np.where(square > 0, -along / square, np.nan)


def _slopes(previous: Row, row: Row, width: int) -> tuple[Array, Array]:
    """``g.u`` and ``h.u`` over all parameters, for a pair of rows in different blocks."""
    before, after = np.zeros(width), np.zeros(width)
    for was, now, g, h in zip(
        previous.before, previous.after, previous.gradients, row.gradients, strict=True
    ):
        if was is None or now is None or g is None or h is None or was.shape != now.shape:
            continue
        if g.shape != was.shape or h.shape != was.shape:
            continue
        update = now - was
        before += _dot(update, g, width)
        after += _dot(update, h, width)
    return before, after


def _dot(left: Tensor, right: Tensor, width: int) -> Array:
    """``[width]`` inner products."""
    if left.is_complex() or right.is_sparse:
        left, right = measurable(left), measurable(right.to_dense())
    left, right = left.reshape(width, -1), right.reshape(width, -1)
    if left.dtype in (torch.float16, torch.bfloat16):
        left = left.float()
    return to_numpy((left * right).sum(1))
