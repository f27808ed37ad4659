"""Tensors to numbers: many rows at once, on the tensors' own device, one transfer a block.

Norms of small tensors are taken by stacking one parameter over all rows of the block (about 0.2
microseconds a tensor, against 1.3 for ``torch._foreach_norm`` and 5 for a single norm); large ones
where they lie, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.capture import NormalizationCall, Number, Row
from divergence_probe.record.schema import (
    BATCH_NORM_COLUMNS,
    MISSING,
    PARAMETER_COLUMNS,
    Array,
    Block,
    Event,
    Layout,
)

# Above this many elements stacking costs more memory traffic than it saves calls.
_STACKED_ELEMENTS = 8192
# What rounding leaves of an update across its gradient is below this part of it.
_WORTH = 1e-2


def measurable(tensor: Tensor) -> Tensor:
    """A dense real tensor with the same norm (sparse gradients are coalesced)."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def norms(tensors: Sequence[Tensor | None], width: int = 1) -> Array:
    """Frobenius norms, in double range: finite tensors never give inf.

    Args:
        tensors: any shapes, dtypes and devices; None gives ``MISSING``.
        width: 1, or the size of a leading task dimension that is kept.

    Returns:
        ``[len(tensors)]``, or ``[len(tensors), width]`` where ``width`` is above 1.
    """
    result = np.full((len(tensors), width), MISSING)
    groups: dict[tuple[object, ...], list[int]] = {}
    dense: dict[int, Tensor] = {}
    for position, tensor in enumerate(tensors):
        if tensor is None:
            continue
        tensor = dense[position] = measurable(tensor)
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(position)
    for positions in groups.values():
        members = [dense[position] for position in positions]
        result[positions] = _rows(_group_norms(members, width))
    overflowed = [p for p in dense if np.isinf(result[p]).any()]
    for position in overflowed:
        # float32 squares overflow from 1.8e19 on: look again before calling it infinite
        wide = dense[position].to(torch.float64).reshape(width, -1)
        result[position] = _rows(torch.linalg.vector_norm(wide, dim=1))
    return result[:, 0] if width == 1 else result


def _group_norms(members: list[Tensor], width: int) -> Tensor:
    first = members[0]
    working = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else None
    if not first.is_floating_point():
        working = torch.float64
    if first.numel() == 0:
        return torch.zeros(len(members), width)
    if width == 1 and first.numel() > _STACKED_ELEMENTS:
        flat = [member if working is None else member.to(working) for member in members]
        return torch.stack(torch._foreach_norm(flat, 2.0)).unsqueeze(1)
    stacked = torch.stack(members).reshape(len(members), width, -1)
    return torch.linalg.vector_norm(stacked, dim=2, dtype=working)


def instability(rows: Sequence[Row]) -> Array:
    """Step size x curvature along each row's previous step; nan where there is none.

    With ``g`` the gradient before a step ``u`` and ``h`` the gradient after it, the loss along the
    step is, to second order, ``g.u (1 - s/2)`` with ``s = 1 - h.u / g.u``: above 2 the step goes
    further up the far side than it came down. For gradient descent on a quadratic ``s`` is exactly
    the step size times the curvature along the gradient (Nesterov, Lectures on Convex Optimization,
    2018, section 1.2.3: gradient descent is stable below 2 / L).

    Returns:
        ``[sum of widths]``.
    """
    result = [np.full(row.width, np.nan) for row in rows]
    pairs = [(i, row, row.previous) for i, row in enumerate(rows) if row.previous is not None]
    columns: dict[tuple[object, ...], list[tuple[int, Tensor, Tensor, Tensor]]] = {}
    for i, row, previous in pairs:
        updates = _differences(previous)
        for g, h, u in zip(previous.gradients, row.gradients, updates, strict=True):
            if g is None or h is None or u is None or g.is_sparse or not g.is_floating_point():
                continue
            key = (u.shape, u.dtype, u.device, row.width)
            columns.setdefault(key, []).append((i, g, h, u))
    slope = {i: np.zeros(row.width) for i, row, _ in pairs}
    slope_after = {i: np.zeros(row.width) for i, row, _ in pairs}
    for (_, _, _, width), members in columns.items():
        g, h, u = (torch.stack([m[k] for m in members]).detach() for k in (1, 2, 3))  # type: ignore[misc]
        u = u.reshape(len(members), width, -1).double()
        before = _rows((g.reshape(u.shape).double() * u).sum(-1))
        after = _rows((h.reshape(u.shape).double() * u).sum(-1))
        for k, member in enumerate(members):
            slope[member[0]] += before[k]
            slope_after[member[0]] += after[k]
    for i in slope:
        with np.errstate(divide="ignore", invalid="ignore"):
            downhill = slope[i] < 0
            result[i] = np.where(downhill, 1 - slope_after[i] / slope[i], np.nan)
    return np.concatenate(result) if result else np.empty(0)


def scalars(values: Sequence[Number]) -> list[float]:
    """Numbers of one-element tensors, in one transfer a device; nan for None."""
    result = [float("nan")] * len(values)
    by_device: dict[torch.device, list[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(position)
        elif value is not None:
            result[position] = float(value)
    for positions in by_device.values():
        stacked = torch.stack([values[p].detach().reshape(-1)[0].double() for p in positions])  # type: ignore[union-attr]
        for position, number in zip(positions, stacked.tolist(), strict=True):
            result[position] = number
    return result


def _rows(tensor: Tensor) -> Array:
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()


def build_block(
    rows: Sequence[Row],
    layout: Layout,
    sites: list[str],
    events: list[Event],
    rank: int,
) -> Block:
    """Measure ``rows`` (all of one layout) and lay the numbers out as a block.

    Args:
        rows: in order of time.
        layout: names; layers met for the first time are appended to it.
        sites: the table behind the rows' sites.
        events: what happened since the block before.
        rank: this process's rank.
    """
    parameters = _parameter_columns(rows, len(layout.parameters))
    batch_norm = _batch_norm_columns(rows, layout)
    dropout = _dropout_column(rows, layout)
    expanded = np.repeat(np.arange(len(rows)), [row.width for row in rows])
    return Block(
        layout=layout,
        scalars=_scalar_columns(rows, parameters),
        parameters=parameters,
        batch_norm={name: values[expanded] for name, values in batch_norm.items()},
        dropout=dropout[expanded],
        events=events,
        sites=sites,
        rank=rank,
    )


def _parameter_columns(rows: Sequence[Row], width: int) -> dict[str, Array]:
    """``[S, P]`` norms; vmapped rows stand for several rows each."""
    columns: dict[str, list[Array]] = {name: [] for name in PARAMETER_COLUMNS}
    plain = [row for row in rows if row.width == 1]
    measured = {}
    if plain:
        updates = [_differences(row) for row in plain]
        kinds = (
            [t for row in plain for t in row.before],
            [t for row in plain for t in row.after],
            [t for update in updates for t in update],
            [t for row in plain for t in row.gradients],
        )
        table = norms([t for kind in kinds for t in kind]).reshape(4, len(plain), width)
        rates = _step_rates(kinds[2], kinds[3], table[3].reshape(-1)).reshape(1, -1, width)
        table = np.concatenate((table, rates))
        measured = {id(row): table[:, i] for i, row in enumerate(plain)}
    for row in rows:
        numbers = measured.get(id(row))
        if numbers is None:
            numbers = _vmapped(row)
        else:
            numbers = numbers[:, None, :]
        for name, values in zip(PARAMETER_COLUMNS, numbers, strict=True):
            columns[name].append(values)
    return {name: np.concatenate(values) for name, values in columns.items()}


def _vmapped(row: Row) -> Array:
    """``[5, width, P]`` columns of a row that stands for ``width`` tasks."""
    kinds = (row.before, row.after, _differences(row), row.gradients)
    table = [norms(kind, row.width).T for kind in kinds]
    return np.stack([*table, np.full_like(table[0], np.nan)])


def _step_rates(
    updates: Sequence[Tensor | None], gradients: Sequence[Tensor | None], sizes: Array
) -> Array:
    """``[len(updates)]``: minus update . gradient over the gradient's squared norm."""
    result = np.full(len(updates), np.nan)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (update, gradient) in enumerate(zip(updates, gradients, strict=True)):
        if update is not None and gradient is not None and not gradient.is_sparse:
            groups.setdefault((update.shape, update.dtype, update.device), []).append(i)
    for members in groups.values():
        u = torch.stack([updates[i] for i in members])  # type: ignore[misc]
        g = torch.stack([gradients[i].to(u.dtype) for i in members])  # type: ignore[union-attr]
        products = _rows((u * g).reshape(len(members), -1).sum(1, dtype=torch.float32))
        with np.errstate(all="ignore"):
            result[members] = np.where(sizes[members] > 0, -products / sizes[members] ** 2, np.nan)
    return result


def _differences(row: Row) -> list[Tensor | None]:
    return [
        after - before
        if before is not None and after is not None and before.shape == after.shape
        else None
        for before, after in zip(row.before, row.after, strict=True)
    ]


def _scalar_columns(rows: Sequence[Row], parameters: dict[str, Array]) -> dict[str, Array]:
    losses = _per_task(rows, [row.loss for row in rows])
    rates = _per_task(rows, [row.learning_rate for row in rows])
    columns: dict[str, list[float]] = {
        name: []
        for name in ("task", "step", "phase", "layout", "site", "seconds", "flags", "loss_seen")
    }
    for row in rows:
        for offset in range(row.width):
            columns["task"].append(row.task + offset)
            columns["step"].append(row.step)
            columns["phase"].append(row.phase)
            columns["layout"].append(row.layout)
            columns["site"].append(row.site)
            columns["seconds"].append(row.seconds)
            columns["flags"].append(row.flags)
            columns["loss_seen"].append(row.loss is not None)
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    arrays["loss"] = losses
    rate_known = np.concatenate([np.full(r.width, r.learning_rate is not None) for r in rows])
    arrays["learning_rate"] = np.where(rate_known, rates, -np.inf)
    arrays["instability"] = instability(rows)
    carried = [_total_norm(row.carried) for row in rows]
    velocities = [_carried_velocity(row) for row in rows]
    arrays["carried_velocity"] = np.repeat(velocities, [row.width for row in rows])
    arrays["carried_gradient"] = np.repeat(carried, [row.width for row in rows])
    return arrays


def _carried_velocity(row: Row) -> float:
    """How far the part of a first update across its gradient points along the task before's last.

    Momentum adds a multiple of the velocity to the gradient, so what is left of the update after
    its gradient is projected out is parallel to what is left of the velocity. nan where there is
    nothing left worth looking at.
    """
    preceding = row.preceding
    if preceding is None or row.width != 1 or preceding.width != 1:
        return float("nan")
    parts = [
        (u.reshape(-1), v.reshape(-1), g.reshape(-1))
        for u, v, g in zip(
            _differences(row), _differences(preceding), row.gradients, strict=True
        )
        if u is not None and v is not None and g is not None and not g.is_sparse
    ]
    if not parts:
        return float("nan")
    update, velocity, gradient = (torch.cat(part).double() for part in zip(*parts, strict=True))
    along = gradient / gradient.norm().clamp_min(1e-30)
    across = update - (update @ along) * along
    other = velocity - (velocity @ along) * along
    if not across.norm() > _WORTH * update.norm():
        return float("nan")
    return float(across @ other / (across.norm() * other.norm()).clamp_min(1e-30))


def _total_norm(tensors: Sequence[Tensor]) -> float:
    return float(np.sqrt(np.square(norms(tensors)).sum())) if tensors else 0.0


def _per_task(rows: Sequence[Row], values: Sequence[Number]) -> Array:
    """One number a task; a scalar stands for every task of a vmapped row."""
    if all(row.width == 1 for row in rows):
        return np.asarray(scalars(values))
    result = []
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, Tensor) and value.numel() == row.width:
            result.append(_rows(value.reshape(-1)))
        else:
            result.append(np.full(row.width, scalars([value])[0]))
    return np.concatenate(result)


def _column(names: list[str], name: str) -> int:
    """The column of a layer; a layer met for the first time gets the next one."""
    try:
        return names.index(name)
    except ValueError:
        names.append(name)
        return len(names) - 1


def _dropout_column(rows: Sequence[Row], layout: Layout) -> Array:
    """``[S, D]``: 1 where a dropout layer dropped, 0 where it passed through, -1 not called."""
    seen = [
        (position, _column(layout.dropouts, call.name or "dropout"), call.training)
        for position, row in enumerate(rows)
        for call in row.forwards.dropouts
    ]
    result = np.full((len(rows), len(layout.dropouts)), MISSING)
    for position, column, training in seen:
        result[position, column] = max(result[position, column], float(training))
    return result


def _batch_norm_columns(rows: Sequence[Row], layout: Layout) -> dict[str, Array]:
    """``[S, B]`` for every normalisation column; layers not called stay at their 'unknown'."""
    calls: dict[int, list[tuple[int, NormalizationCall]]] = {}
    for position, row in enumerate(rows):
        for call in row.forwards.normalizations:
            layer = _column(layout.batch_norms, call.name or "batch_norm")
            calls.setdefault(layer, []).append((position, call))
    shape = (len(rows), len(layout.batch_norms))
    columns = {
        name: np.full(shape, np.nan if name in _DISTANCES else MISSING)
        for name in BATCH_NORM_COLUMNS
    }
    for layer, members in calls.items():
        _fill_layer(columns, layer, members)
    return columns


_DISTANCES = ("bn_mean_distance", "bn_log_variance_ratio", "bn_drift")


def _fill_layer(
    columns: dict[str, Array], layer: int, members: list[tuple[int, NormalizationCall]]
) -> None:
    batches = scalars([call.batches for _, call in members])
    for (row, call), seen in zip(members, batches, strict=True):
        mode = columns["bn_training"][row, layer]
        columns["bn_training"][row, layer] = (
            float(call.training) if mode in (MISSING, float(call.training)) else 2.0
        )
        calls = columns["bn_calls"]
        calls[row, layer] = max(calls[row, layer], 0.0) + 1
        fewest = columns["bn_values"]
        fewest[row, layer] = (
            call.values if fewest[row, layer] < 0 else min(call.values, fewest[row, layer])
        )
        if not np.isnan(seen):
            columns["bn_batches"][row, layer] = seen
        if call.buffers:
            columns["bn_shared"][row, layer] = float(call.shared)
    measured = [(row, call) for row, call in members if call.before is not None]
    for width in {call.before.shape for _, call in measured if call.before is not None}:
        same = [(r, c) for r, c in measured if c.before is not None and c.before.shape == width]
        _fill_statistics(columns, layer, same)


def _fill_statistics(
    columns: dict[str, Array], layer: int, members: list[tuple[int, NormalizationCall]]
) -> None:
    """Running against batch statistics, all calls of one layer at once: ``[N, 2, C]``."""
    before = torch.stack([c.before for _, c in members if c.before is not None]).double()
    after = torch.stack(
        [c.after if c.after is not None else c.before for _, c in members]  # type: ignore[misc]
    ).double()
    batch = torch.stack([_batch_statistics(call) for _, call in members])
    known = torch.tensor([_batch_is_known(call) for _, call in members], device=batch.device)
    deviation = batch[:, 1].clamp_min(0).add(1e-12).sqrt()
    distance = ((before[:, 0] - batch[:, 0]) / deviation).square().mean(-1).sqrt()
    # An eps as BatchNorm's own keeps dead channels (batch variance 0) from dominating.
    log_ratio = ((before[:, 1] + 1e-5).log() - (batch[:, 1].clamp_min(0) + 1e-5).log()).mean(-1)
    drift = ((after[:, 0] - before[:, 0]) / deviation).square().mean(-1).sqrt()
    untrained = (before[:, 0] == 0).all(-1) & (before[:, 1] == 1).all(-1)
    finite = batch.isfinite().all(-1).all(-1)
    table = {
        "bn_mean_distance": distance,
        "bn_log_variance_ratio": log_ratio,
        "bn_drift": drift,
        "bn_running_mean_before": before[:, 0].norm(dim=-1),
        "bn_running_mean_after": after[:, 0].norm(dim=-1),
        "bn_running_var_before": before[:, 1].mean(-1),
        "bn_running_var_after": after[:, 1].mean(-1),
        "bn_input_finite": torch.where(known, finite.double(), -1.0),
        "bn_untrained": untrained.double(),
    }
    numbers = {name: _rows(values) for name, values in table.items()}
    for position, (row, _) in enumerate(members):
        for name, values in numbers.items():
            columns[name][row, layer] = values[position]


def _batch_is_known(call: NormalizationCall) -> bool:
    moved = call.training and call.after is not None and call.momentum > 0
    return call.batch is not None or moved


def _batch_statistics(call: NormalizationCall) -> Tensor:
    """The batch's own mean and variance ``[2, C]``; nan where they cannot be known.

    In train mode they come free: running = (1 - momentum) * running + momentum * batch.
    """
    assert call.before is not None
    if call.batch is not None:
        return call.batch.double()
    if _batch_is_known(call) and call.after is not None:
        old, new = call.before.double(), call.after.double()
        return (new - (1 - call.momentum) * old) / call.momentum
    return torch.full_like(call.before, float("nan"), dtype=torch.float64)
