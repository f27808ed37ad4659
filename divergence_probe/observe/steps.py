"""The numbers of inner steps, one parameter at a time over all rows of a block.

(Where all of a model's are kept in one vector: :mod:`.step_vectors` and :mod:`.step_pieces`.) One
parameter has one shape, so its tensors of a whole block stack into one: about twelve tensor
operations a parameter and block, whatever the number of rows, instead of six a row. Large tensors
are measured where they lie; stacking them would move more memory than it saves calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.capture import Row
from divergence_probe.observe.norms import STACKED_ELEMENTS, measurable, norms, to_numpy
from divergence_probe.observe.snapshot import Snapshot, shapes_of
from divergence_probe.observe.step_pieces import measure_pieces
from divergence_probe.observe.step_vectors import measure_vectors
from divergence_probe.record.schema import MISSING, PARAMETER_COLUMNS, Array

# Elements of one stack: beyond that every operation on it pays for fresh pages of memory.
_STACKED_AT_ONCE = 2**17
# Elements of large tensors looked at before the next kind of number is taken of them.
_LARGE_AT_ONCE = 2**19
_LEAST_AT_ONCE = 32


@dataclass
class StepNumbers:
    """What a block's rows of one width come to.

    Attributes:
        columns: ``[S, W, P]`` for each of ``schema.PARAMETER_COLUMNS``.
        instability: ``[S, W]`` step size x curvature along each row's previous step.
    """

    columns: dict[str, Array]
    instability: Array


def measured_at_once(rows: Sequence[Row]) -> int:
    """How many of ``rows`` to measure in one go: what is stacked should stay in the caches."""
    shapes = [shape for row in rows[:2] for shape in shapes_of(row.before)]
    sizes = [shape.numel() for shape in shapes if shape is not None]
    largest = max((size for size in sizes if size <= STACKED_ELEMENTS), default=1)
    return max(_STACKED_AT_ONCE // max(largest, 1), _LEAST_AT_ONCE)


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
    chosen = _Chosen.of([i for i, row in enumerate(rows) if row.before is not row.after], previous)
    kept = [rows[i] for i in chosen.rows]
    if not (width == 1 and kept and _as_vectors(kept, chosen, columns, slope, slope_after)):
        # By parameter instead of by row.
        befores, afters, gradients = (
            list(zip(*(getattr(row, name) for row in kept), strict=True))
            for name in ("before", "after", "gradients")
        )
        for parameter in range(parameters if kept else 0):
            triples = (befores[parameter], afters[parameter], gradients[parameter])
            _parameter(triples, parameter, width, chosen, previous, columns, slope, slope_after)
    for i, row in enumerate(rows):
        if row.previous is not None and previous[i] < 0:  # in the block before: by itself
            slope[i], slope_after[i] = _slopes(row.previous, row, width)
    with np.errstate(all="ignore"):
        product = np.where(slope < 0, 1 - slope_after / slope, np.nan)
    return StepNumbers(columns, product)


def _as_vectors(
    rows: Sequence[Row], chosen: _Chosen, columns: dict[str, Array], slope: Array, after: Array
) -> bool:
    """Fill in rows whose sets are one vector each; False, and nothing is done, where that fails."""
    numbers = measure_vectors(rows, chosen.here, chosen.there) or measure_pieces(
        rows, chosen.here, chosen.there
    )
    if numbers is None:
        return False
    for name, values in numbers.columns.items():
        columns[name][chosen.rows, 0] = values
    with np.errstate(all="ignore"):
        square = numbers.columns["gradient_norm"] ** 2
        columns["step_rate"][chosen.rows, 0] = np.where(
            square > 0, -numbers.descent / square, np.nan
        )
    slope[chosen.later, 0] += numbers.descent[chosen.there].sum(-1)
    after[chosen.later, 0] += numbers.along_next
    return True


@dataclass
class _Chosen:
    """Rows that are measured together, and which of them follow on one another.

    Attributes:
        rows: indices of the rows.
        later: indices of those whose previous row is among them.
        here: their positions in ``rows``.
        there: the positions of their previous rows.
        adjacent: whether there are any, and each previous row comes just before.
    """

    rows: list[int]
    later: list[int]
    here: list[int]
    there: list[int]
    adjacent: bool

    @classmethod
    def of(cls, rows: list[int], previous: Sequence[int]) -> _Chosen:
        """``rows``, and the pairs among them by ``previous``."""
        index = {i: k for k, i in enumerate(rows)}
        later = [i for i in rows if previous[i] in index]
        here, there = [index[i] for i in later], [index[previous[i]] for i in later]
        adjacent = bool(later) and all(h == t + 1 for h, t in zip(here, there, strict=True))
        return cls(rows, later, here, there, adjacent)


_Triple = tuple[Tensor | None, Tensor | None, Tensor | None]
_Stacks = tuple[Tensor, Tensor, Tensor]


def _parameter(
    kinds: tuple[Sequence[Tensor | None], ...],
    parameter: int,
    width: int,
    chosen: _Chosen,
    previous: Sequence[int],
    columns: dict[str, Array],
    slope: Array,
    slope_after: Array,
) -> None:
    """Fill in one parameter's column from its values before, after, and its gradients."""
    triples: list[_Triple] = list(zip(*kinds, strict=True))
    stacks = _all_stacked(kinds, width)
    if stacks is None:
        where = dict(zip(chosen.rows, triples, strict=True))
        whole = [i for i, triple in where.items() if _is_whole(triple)]
        rest = [i for i in chosen.rows if not _is_whole(where[i])]
        if rest:
            odd = {i: where[i] for i in rest}
            _each(odd, parameter, width, previous, columns, slope, slope_after)
        if not whole:
            return
        triples, chosen = [where[i] for i in whole], _Chosen.of(whole, previous)
        before, after, gradient = _alike(_stacked([t[k] for t in triples], width) for k in range(3))
    else:
        before, after, gradient = stacks
    update = after - before
    numbers = [torch.linalg.vector_norm(t, dim=2) for t in (before, after, update, gradient)]
    descent = torch.linalg.vecdot(gradient, update)
    if chosen.adjacent:  # no need to gather copies
        along_next = torch.linalg.vecdot(gradient[1:], update[:-1])
        numbers.append(along_next[chosen.there])
    elif chosen.later:
        numbers.append(torch.linalg.vecdot(gradient[chosen.here], update[chosen.there]))
    table = to_numpy(torch.cat([*numbers[:4], descent, *numbers[4:]]))
    whole, size = chosen.rows, len(chosen.rows)
    overflowed = np.isinf(table[: 4 * size]).any()
    for k, name in enumerate(("norm_before", "norm_after", "update_norm", "gradient_norm")):
        columns[name][whole, :, parameter] = table[k * size : (k + 1) * size]
        if overflowed:
            _check_overflow(columns[name], whole, parameter, triples, k, width)
    along, after_along = table[4 * size : 5 * size], table[5 * size :]
    with np.errstate(all="ignore"):
        square = columns["gradient_norm"][whole, :, parameter] ** 2
        columns["step_rate"][whole, :, parameter] = np.where(square > 0, -along / square, np.nan)
    if chosen.later:
        slope[chosen.later] += along[chosen.there]
        slope_after[chosen.later] += after_along


def _all_stacked(kinds: tuple[Sequence[Tensor | None], ...], width: int) -> _Stacks | None:
    """Every row at once, where all are whole; None where they must be looked at one by one."""
    first = kinds[0][0]
    if first is None or first.numel() > STACKED_ELEMENTS:
        return None
    try:  # torch itself is the quickest to tell whether they are all there and alike
        before, after, gradient = (torch.stack(tensors) for tensors in kinds)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        return None
    if not _is_whole((before, after, gradient), len(kinds[0])):
        return None
    return _alike(t.detach().reshape(len(t), width, -1) for t in (before, after, gradient))


def _alike(stacks: Iterable[Tensor]) -> _Stacks:
    """All of one kind, the widest among them, and of single precision at least."""
    before, after, gradient = stacks
    kind = functools.reduce(torch.promote_types, (after.dtype, gradient.dtype), before.dtype)
    kind = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
    return before.to(kind), after.to(kind), gradient.to(kind)


def _is_whole(triple: _Triple, members: int = 1) -> bool:
    """Whether before, after and gradient (or so many of them) are there, dense, small, alike."""
    before, after, gradient = triple
    if before is None or after is None or gradient is None:
        return False
    if before.numel() > STACKED_ELEMENTS * members or not before.is_floating_point():
        return False
    strided = torch.strided
    if before.layout is not strided or gradient.layout is not strided:
        return False
    return before.shape == after.shape == gradient.shape


def _stacked(tensors: Sequence[Tensor | None], width: int) -> Tensor:
    """``[R, W, n]`` of one kind."""
    present = [tensor for tensor in tensors if tensor is not None]
    first = present[0]
    if any(t.dtype is not first.dtype or t.device != first.device for t in present):
        present = [tensor.to(device=first.device, dtype=torch.float32) for tensor in present]
    return torch.stack(present).detach().reshape(len(present), width, -1)


def _check_overflow(
    column: Array,
    rows: Sequence[int],
    parameter: int,
    triples: Sequence[_Triple],
    kind: int,
    width: int,
) -> None:
    """float32 squares overflow from 1.8e19 on: look again before calling a norm infinite."""
    if not np.isinf(column[:, :, parameter]).any():
        return
    for i, (before, after, gradient) in zip(rows, triples, strict=True):
        if not np.isinf(column[i, :, parameter]).any():
            continue
        assert before is not None and after is not None
        tensor = (before, after, after.cpu().double() - before.cpu().double(), gradient)[kind]
        column[i, :, parameter] = norms([tensor], width)


def _each(
    where: dict[int, _Triple],
    parameter: int,
    width: int,
    previous: Sequence[int],
    columns: dict[str, Array],
    slope: Array,
    slope_after: Array,
) -> None:
    """Rows with something missing, sparse, or too large to be worth stacking, by their index."""
    rows, at_once = list(where), _rows_in_cache(where)
    awaited = {previous[i] for i in rows}
    updates: dict[int, Tensor] = {}
    known: dict[int, Array] = {}
    products: dict[tuple[int, int], Tensor] = {}  # of a row's gradient with a row's update
    for chosen in (rows[i : i + at_once] for i in range(0, len(rows), at_once)):
        updates |= {i: update for i in chosen if (update := _update(where[i])) is not None}
        _measure_each(where, chosen, updates, known, parameter, width, columns)
        for pair in ((i, row) for i in chosen for row in (i, previous[i])):
            gradient, update = where[pair[0]][2], updates.get(pair[1])
            if update is not None and gradient is not None and update.shape == gradient.shape:
                products[pair] = _dot(update, gradient, width)
        awaited -= {previous[i] for i in chosen}
        updates = {i: update for i, update in updates.items() if i in awaited}
    _note_products(products, parameter, previous, columns, slope, slope_after)


def _update(triple: _Triple) -> Tensor | None:
    before, after, _ = triple
    both = before is not None and after is not None and before.shape == after.shape
    return after - before if both else None  # type: ignore[operator]


def _rows_in_cache(where: dict[int, _Triple]) -> int:
    """How many rows of one parameter to look at before the next, so that they are read once."""
    present = [t for triple in where.values() for t in triple if t is not None]
    if not present or not present[0].is_cpu:
        return max(len(where), 1)
    return max(_LARGE_AT_ONCE // max(present[0].numel(), 1), 1)


def _measure_each(
    where: dict[int, _Triple],
    chosen: Sequence[int],
    updates: dict[int, Tensor],
    known: dict[int, Array],
    parameter: int,
    width: int,
    columns: dict[str, Array],
) -> None:
    """Norms of some rows; of values that are one step's result and the next one's start, once."""
    values = {id(t): t for i in chosen for t in where[i][:2] if id(t) not in known}
    others = [*(updates.get(i) for i in chosen), *(where[i][2] for i in chosen)]
    found = norms([*values.values(), *others], width).reshape(-1, width)
    known |= zip(values, found, strict=False)
    found = found[len(values) :]
    for k, i in enumerate(chosen):
        before, after, _ = where[i]
        columns["norm_before"][i, :, parameter] = known[id(before)]
        columns["norm_after"][i, :, parameter] = known[id(after)]
        columns["update_norm"][i, :, parameter] = found[k]
        columns["gradient_norm"][i, :, parameter] = found[len(chosen) + k]


def _note_products(
    products: dict[tuple[int, int], Tensor],
    parameter: int,
    previous: Sequence[int],
    columns: dict[str, Array],
    slope: Array,
    slope_after: Array,
) -> None:
    """Rates and slopes of rows that were looked at one by one; one transfer."""
    if not products:
        return
    first = next(iter(products.values()))
    stacked = to_numpy(torch.stack([product.to(first) for product in products.values()]))
    along = dict(zip(products, stacked, strict=True))
    for i, row in along:
        if i == row:
            with np.errstate(all="ignore"):
                square = columns["gradient_norm"][i, :, parameter] ** 2
                rate = np.where(square > 0, -along[i, i] / square, np.nan)
            columns["step_rate"][i, :, parameter] = rate
        elif (row, row) in along:
            slope[i] += along[row, row]
            slope_after[i] += along[i, row]


def _slopes(previous: Row, row: Row, width: int) -> tuple[Array, Array]:
    """``g.u`` and ``h.u`` over all parameters, for a pair of rows in different blocks."""
    sets = (previous.before, previous.after, previous.gradients, row.gradients)
    if width == 1 and all(isinstance(values, Snapshot) for values in sets):
        start, end, old, new = (values.vector for values in sets if isinstance(values, Snapshot))
        if len(start) == len(end) == len(old) == len(new):
            update = end - start
            return to_numpy(_dot(update, old, 1)), to_numpy(_dot(update, new, 1))
    before, after = np.zeros(width), np.zeros(width)
    for was, now, g, h in zip(
        previous.before, previous.after, previous.gradients, row.gradients, strict=True
    ):
        if was is None or now is None or g is None or h is None or was.shape != now.shape:
            continue
        if g.shape != was.shape or h.shape != was.shape:
            continue
        update = now - was
        before += to_numpy(_dot(update, g, width))
        after += to_numpy(_dot(update, h, width))
    return before, after


def _dot(left: Tensor, right: Tensor, width: int) -> Tensor:
    """``[width]`` inner products."""
    if left.is_complex() or right.is_sparse:
        left, right = measurable(left), measurable(right.to_dense())
    if left.dtype in (torch.float16, torch.bfloat16):
        left = left.float()
    if right.dtype is not left.dtype or right.device != left.device:
        right = right.to(left)
    if width == 1:  # (vecdot multiplies first and sums then)
        return torch.dot(left.reshape(-1), right.reshape(-1)).unsqueeze(0)
    product: Tensor = torch.linalg.vecdot(left.reshape(width, -1), right.reshape(width, -1))
    return product
