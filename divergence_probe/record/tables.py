"""A recording as pandas tables, one long row per thing, names instead of indices."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from divergence_probe.record.damage import told_as_damage
from divergence_probe.record.schema import (
    BATCH_NORM_COLUMNS,
    MISSING,
    PARAMETER_COLUMNS,
    PHASES,
    Block,
)

if TYPE_CHECKING:
    from divergence_probe.record.reader import Recording

_STEP_COLUMNS = ("task", "step", "loss", "learning_rate", "instability", "seconds")


def steps(recording: Recording) -> pd.DataFrame:
    """One row per step and parameter.

    Columns: ``rank, task, step, phase, parameter, norm_before, norm_after, update_norm,
    gradient_norm, growth, loss, learning_rate, instability, site``.

    Norms are Frobenius norms; a norm that was not there to be measured is NA. ``growth`` is
    ``norm_after / norm_before``.
    """
    parts = [_steps_of(block) for block in recording.blocks() if len(block)]
    if not parts:
        columns = [
            "rank",
            *_STEP_COLUMNS,
            "phase",
            "parameter",
            *PARAMETER_COLUMNS,
            "growth",
            "site",
        ]
        return pd.DataFrame(columns=columns)
    return pd.concat(parts, ignore_index=True)


def _steps_of(block: Block) -> pd.DataFrame:
    names = [info.name for info in block.layout.parameters]
    width = len(names)
    data: dict[str, Any] = _repeated(block, width)
    data["parameter"] = names * len(block)
    for name in PARAMETER_COLUMNS:
        values = block.parameters[name].reshape(-1)
        data[name] = np.where(values == MISSING, np.nan, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        data["growth"] = np.asarray(data["norm_after"]) / np.asarray(data["norm_before"])
    return pd.DataFrame(data)


def _repeated(block: Block, width: int) -> dict[str, Any]:
    data: dict[str, Any] = {"rank": np.full(len(block) * width, block.rank)}
    data |= {name: np.repeat(block.scalars[name], width) for name in _STEP_COLUMNS}
    for name in ("task", "step"):
        data[name] = data[name].astype(int)
    data["phase"] = np.repeat([PHASES[int(p)] for p in block.scalars["phase"]], width)
    data["site"] = np.repeat([block.site(row) or "" for row in range(len(block))], width)
    return data


def batch_norm(recording: Recording) -> pd.DataFrame:
    """One row per step and normalisation layer that was called; columns as in the schema."""
    parts = []
    for block in recording.blocks():
        called = block.batch_norm["bn_calls"]
        if not len(block) or not called.size:
            continue
        names = block.layout.batch_norms[: called.shape[1]]
        data = _repeated(block, called.shape[1])
        data["layer"] = names * len(block)
        for name in BATCH_NORM_COLUMNS:
            data[name.removeprefix("bn_")] = block.batch_norm[name].reshape(-1)
        parts.append(pd.DataFrame(data).loc[called.reshape(-1) > 0])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def tasks(recording: Recording) -> pd.DataFrame:
    """One row per task: where it began, how it was seen, how many steps it took."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for block in recording.blocks():
        for event in block.events:
            members = [(block.rank, event.task + i) for i in range(int(event.data.get("width", 1)))]
            if event.kind == "task-start":
                for rank, task in members:
                    facts = {"rank": rank, "task": task, "site": event.site}
                    rows[rank, task] = {**facts, **event.data}
            elif event.kind == "task-end" and (block.rank, event.task) in rows:
                first = rows[block.rank, event.task]
                for offset in range(int(first.get("width", 1))):
                    rows[block.rank, event.task + offset]["steps"] = event.data.get("steps")
    return pd.DataFrame(list(rows.values()))


def findings(recording: Recording) -> pd.DataFrame:
    """One row per finding of the run's own diagnosis; empty where it was never written."""
    path = recording.folder / "findings.json"
    if not path.exists():
        return pd.DataFrame()
    with told_as_damage(path):
        rows = json.loads(path.read_text(encoding="utf-8"))
        return pd.DataFrame([dict(row) for row in rows])
