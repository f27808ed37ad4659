"""Rows to a block: many rows at once, on the tensors' own device, a few transfers a block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from divergence_probe.observe.capture import NormalizationCall, Number, Row
from divergence_probe.observe.norms import norms, scalars, to_numpy
from divergence_probe.observe.steps import measure, measured_at_once
from divergence_probe.observe.velocity import carried_velocities, has_another_direction
from divergence_probe.record.schema import (
    BATCH_NORM_COLUMNS,
    BATCH_NORM_DISTANCES,
    FLAGS,
    MISSING,
    PARAMETER_COLUMNS,
    QUERY,
    Array,
    Block,
    Event,
    Layout,
)

#: The column of the flags among a row's plain numbers.
_FLAGS = 6

#: A normalisation call: of which row, in which column, and the call.
_Met = tuple[int, int, NormalizationCall]


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
    parameters, unstable = _steps(rows, len(layout.parameters))
    batch_norm = _batch_norm_columns(rows, layout)
    dropout = _dropout_column(rows, layout)
    expanded = np.repeat(np.arange(len(rows)), [row.width for row in rows])
    return Block(
        layout=layout,
        scalars=_scalar_columns(rows, parameters) | {"instability": unstable},
        parameters=parameters,
        batch_norm={name: values[expanded] for name, values in batch_norm.items()},
        dropout=dropout[expanded],
        events=events,
        sites=sites,
        rank=rank,
    )


def _steps(rows: Sequence[Row], parameters: int) -> tuple[dict[str, Array], Array]:
    """``[S, P]`` columns and ``[S]`` instability; a vmapped row stands for several."""
    widths = [row.width for row in rows]
    total = int(sum(widths))
    columns = {name: np.empty((total, parameters)) for name in PARAMETER_COLUMNS}
    unstable = np.empty(total)
    starts = np.cumsum([0, *widths])
    for width in set(widths):
        same = [i for i, row in enumerate(rows) if row.width == width]
        count = measured_at_once([rows[i] for i in same])
        for chosen in (same[i : i + count] for i in range(0, len(same), count)):
            numbers = measure([rows[i] for i in chosen], parameters, width)
            places = (starts[chosen][:, None] + np.arange(width)).reshape(-1)
            for name, values in numbers.columns.items():
                columns[name][places] = values.reshape(-1, parameters)
            unstable[places] = numbers.instability.reshape(-1)
    return columns, unstable


def _scalar_columns(rows: Sequence[Row], parameters: dict[str, Array]) -> dict[str, Array]:
    own = [_own_loss(row) for row in rows]
    losses = _per_task(rows, own)
    rates = _per_task(rows, [row.learning_rate for row in rows])
    table = np.asarray(
        [
            (r.task, r.step, r.phase, r.layout, r.site, r.seconds, r.flags,
             loss is not None, r.learning_rate is not None,
             _total_norm(r.carried) if r.carried else 0.0)
            for r, loss in zip(rows, own, strict=True)
        ],
        dtype=np.float64,
    )  # fmt: skip
    _add_late_flags(table, rows)
    widths = [row.width for row in rows]
    names = ("task", "step", "phase", "layout", "site", "seconds", "flags", "loss_seen")
    arrays = {name: np.repeat(table[:, i], widths) for i, name in enumerate(names)}
    starts = np.cumsum([0, *widths[:-1]])
    arrays["task"] += np.arange(sum(widths)) - np.repeat(starts, widths)
    arrays["loss"] = losses
    arrays["learning_rate"] = np.where(np.repeat(table[:, 8], widths) > 0, rates, -np.inf)
    asked = table[:, 2] == QUERY
    arrays["carried_gradient"] = np.repeat(np.where(asked, 0.0, table[:, 9]), widths)
    taken = asked & np.asarray([bool(row.carried) for row in rows])
    arrays["query_gradient"] = np.repeat(np.where(taken, table[:, 9], np.nan), widths)
    turned = has_another_direction(parameters)[starts]
    arrays["carried_velocity"] = np.repeat(carried_velocities(rows, turned), widths)
    return arrays


def _add_late_flags(table: Array, rows: Sequence[Row]) -> None:
    """Add the flags that are read only now."""
    late = [position for position, row in enumerate(rows) if row.clipped is not None]
    if late:
        clipped = np.array(scalars([rows[position].clipped for position in late])) > 0
        late = [position for position, was in zip(late, clipped, strict=True) if was]
        table[late, _FLAGS] = table[late, _FLAGS].astype(np.int64) | FLAGS["clipped"]


def _total_norm(tensors: Sequence[Tensor]) -> float:
    return float(np.sqrt(np.square(norms(tensors)).sum()))


def _own_loss(row: Row) -> Number:
    """A row's loss; None where it is those of several models that a vmap ran as one task."""
    loss = row.loss
    if isinstance(loss, Tensor) and loss.numel() not in (1, row.width):
        return None
    return loss


def _per_task(rows: Sequence[Row], values: Sequence[Number]) -> Array:
    """One number a task; a scalar stands for every task of a vmapped row."""
    if all(row.width == 1 for row in rows):
        return np.asarray(scalars(values))
    result = []
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, Tensor) and value.numel() == row.width:
            result.append(to_numpy(value.reshape(-1)))
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
    met = [
        (position, _column(layout.batch_norms, call.name or "batch_norm"), call)
        for position, row in enumerate(rows)
        for call in row.forwards.normalizations
    ]
    shape = (len(rows), len(layout.batch_norms))
    columns = {
        name: np.full(shape, np.nan if name in BATCH_NORM_DISTANCES else MISSING)
        for name in BATCH_NORM_COLUMNS
    }
    if met:
        _fill_facts(columns, met)
    alike: dict[object, list[_Met]] = {}
    for entry in met:
        before = entry[2].before
        if before is not None:
            alike.setdefault((before.shape, before.device), []).append(entry)
    for same in alike.values():
        _fill_statistics(columns, same)
    return columns


def _fill_facts(columns: dict[str, Array], met: Sequence[_Met]) -> None:
    """How layers were called; of several calls of one for a row, the last counts for its state."""
    calls = [call for *_, call in met]
    places = np.array([row for row, *_ in met]), np.array([layer for _, layer, _ in met])
    shape = columns["bn_calls"].shape
    training = np.array([float(call.training) for call in calls])
    least, most, fewest = np.full(shape, np.inf), np.full(shape, -np.inf), np.full(shape, np.inf)
    np.minimum.at(least, places, training)
    np.maximum.at(most, places, training)
    np.minimum.at(fewest, places, [call.values for call in calls])
    times = np.zeros(shape)
    np.add.at(times, places, 1)
    called = times > 0
    columns["bn_training"][called] = np.where(least == most, least, 2.0)[called]
    columns["bn_calls"][called] = times[called]
    columns["bn_values"][called] = fewest[called]
    batches = np.array(scalars([call.batches for call in calls]))
    _put(columns["bn_batches"], places, ~np.isnan(batches), batches)
    shared = np.array([float(call.shared) for call in calls])
    _put(columns["bn_shared"], places, np.array([bool(call.buffers) for call in calls]), shared)


def _put(column: Array, places: tuple[Array, Array], where: Array, values: Array) -> None:
    """Write those values that are known."""
    rows, layers = places
    column[rows[where], layers[where]] = values[where]


def _fill_statistics(columns: dict[str, Array], met: Sequence[_Met]) -> None:
    """Running against batch statistics, of all calls of layers alike at once: ``[N, 2, C]``."""
    calls = [call for *_, call in met]
    before = _stacked([call.before for call in calls])
    after = _stacked([call.after if call.after is not None else call.before for call in calls])
    batch = _batch_statistics(calls, before, after)
    known = torch.tensor([call.batch is not None or _moved(call) for call in calls])
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
    rows, layers = [row for row, *_ in met], [layer for _, layer, _ in met]
    for name, values in table.items():
        columns[name][rows, layers] = to_numpy(values)


def _moved(call: NormalizationCall) -> bool:
    return call.training and call.after is not None and call.momentum > 0


def _batch_statistics(calls: Sequence[NormalizationCall], before: Tensor, after: Tensor) -> Tensor:
    """The batches' own mean and variance ``[N, 2, C]``; nan where they cannot be known.

    In train mode they come free: running = (1 - momentum) * running + momentum * batch.
    """
    rates = [call.momentum if _moved(call) else math.nan for call in calls]
    momentum = torch.tensor(rates, dtype=torch.float64).view(-1, 1, 1)
    batch = (after - (1 - momentum) * before) / momentum
    measured = [i for i, call in enumerate(calls) if call.batch is not None]
    if measured:
        batch[measured] = _stacked([calls[i].batch for i in measured])
    return batch


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    """Means and variances ``[N, 2, C]`` in double precision on the CPU, by one transfer."""
    stacked = torch.stack([t for t in tensors if t is not None]).cpu().double()
    return stacked.view(len(stacked), 2, -1)
