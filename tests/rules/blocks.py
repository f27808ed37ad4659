"""Hand-made blocks: rows as a rule would meet them, everything healthy but what a test names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from divergence_probe.record.schema import (
    BATCH_NORM_COLUMNS,
    FLAGS,
    MISSING,
    OUTER,
    PARAMETER_COLUMNS,
    QUERY,
    SUPPORT,
    Array,
    Block,
    Event,
    Layout,
    ParameterInfo,
)
from divergence_probe.rules.base import Rule
from divergence_probe.rules.engine import Engine
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.registry import all_rules
from divergence_probe.thresholds import Thresholds

NAN = float("nan")
INF = float("inf")
PARAMETERS = ("body.0.weight", "body.0.bias", "head.weight")
SITES = ["train.py:12", "train.py:20", "train.py:30"]
HERE, QUERY_SITE, OUTER_SITE = SITES

Row = dict[str, Any]

_SCALARS = {
    "task": 0.0,
    "step": 0.0,
    "phase": float(SUPPORT),
    "layout": 0.0,
    "site": 0.0,
    "loss": 1.0,
    "loss_seen": 1.0,
    "learning_rate": 0.1,
    "instability": NAN,
    "carried_gradient": 0.0,
    "carried_velocity": NAN,
    "query_gradient": NAN,
    "flags": 0.0,
}
_PARAMETERS = {
    "norm_before": 10.0,
    "norm_after": 10.0,
    "update_norm": 0.1,
    "gradient_norm": 1.0,
    "step_rate": 0.1,
}
_NOT_CALLED = {
    name: NAN if name in ("bn_mean_distance", "bn_log_variance_ratio", "bn_drift") else MISSING
    for name in BATCH_NORM_COLUMNS
}
_SECOND = float(FLAGS["second_order"])


def inner(task: int = 0, step: int = 0, **columns: Any) -> Row:
    """An inner step. A number stands for every parameter (or layer), a sequence for one each."""
    return {"task": task, "step": step, **columns}


def query(task: int = 0, **columns: Any) -> Row:
    """What ran after a task's last step: no parameters."""
    nothing = dict.fromkeys(PARAMETER_COLUMNS, MISSING) | {"step_rate": NAN}
    return {"task": task, "step": 3, "phase": QUERY, "site": 1, **nothing, **columns}


def outer(**columns: Any) -> Row:
    """A step of the outer optimizer."""
    return {
        "task": -1,
        "step": -1,
        "phase": OUTER,
        "site": 2,
        "loss": NAN,
        "loss_seen": 0,
        **columns,
    }


def second_order(row: Row) -> Row:
    """The same row, its gradient with a graph."""
    return {"flags": _SECOND, **row}


def train(values: float = 64, **columns: Any) -> Row:
    """Columns of BatchNorm layers that ran in train mode, on buffers of their own."""
    return {
        "bn_training": 1,
        "bn_calls": 1,
        "bn_values": values,
        "bn_batches": 5,
        "bn_mean_distance": 0.2,
        "bn_log_variance_ratio": 0.1,
        "bn_drift": 0.1,
        "bn_input_finite": 1,
        "bn_untrained": 0,
        "bn_shared": 0,
        **columns,
    }


def evaluated(**columns: Any) -> Row:
    """Columns of BatchNorm layers that ran in eval mode with fitting statistics."""
    return train(**{"bn_training": 0, "bn_drift": 0.0, **columns})


def start(task: int = 0, seconds: float = 0.0, site: str | None = HERE, **data: Any) -> Event:
    """A task begins."""
    return Event("task-start", task, 0, seconds, site, {"adapter": "by hand", "width": 1, **data})


def end(task: int = 0, seconds: float = 0.0) -> Event:
    """A task ends."""
    return Event("task-end", task, 3, seconds, None, {"steps": 3})


def make(
    *rows: Row,
    parameters: Sequence[str] = PARAMETERS,
    batch_norms: Sequence[str] = (),
    dropouts: Sequence[str] = (),
    events: Iterable[Event] = (),
    dtype: str = "float32",
    device: str = "cpu",
    rank: int = 0,
    since: float = 0.0,
) -> Block:
    """A block of ``rows``; row ``i`` is taken ``i`` seconds after ``since``."""
    infos = tuple(ParameterInfo(name, (4, 4), dtype, device) for name in parameters)
    scalars = {name: np.asarray([r.get(name, d) for r in rows]) for name, d in _SCALARS.items()}
    scalars = {name: values.astype(np.float64) for name, values in scalars.items()}
    scalars["seconds"] = since + np.arange(len(rows), dtype=np.float64)
    return Block(
        Layout(0, "Net", infos, list(batch_norms), list(dropouts)),
        scalars,
        {name: _table(rows, name, d, len(infos)) for name, d in _PARAMETERS.items()},
        {name: _table(rows, name, d, len(batch_norms)) for name, d in _NOT_CALLED.items()},
        _table(rows, "dropout", MISSING, len(dropouts)),
        list(events),
        SITES,
        rank,
    )


def _table(rows: Sequence[Row], name: str, default: float, width: int) -> Array:
    table = np.empty((len(rows), width))
    for number, row in enumerate(rows):
        table[number] = row.get(name, default)
    return table


def rule(code: str) -> type[Rule]:
    """The rule class of ``code``."""
    return next(rule for rule in all_rules() if rule.code == code)


def findings(code: str, *blocks: Block, **thresholds: float) -> tuple[Finding, ...]:
    """What the rule ``code`` alone says of ``blocks``, folded."""
    names = {name.replace("_", "-"): value for name, value in thresholds.items()}
    engine = Engine([rule(code)], thresholds=Thresholds(names))
    for block in blocks:
        engine.feed(block)
    engine.finish()
    return engine.findings


def one(code: str, *blocks: Block, **thresholds: float) -> Finding:
    """The only finding of rule ``code``; fails where it has none or several."""
    found = findings(code, *blocks, **thresholds)
    assert [finding.rule for finding in found] == [code], found
    return found[0]


def silent(code: str, *blocks: Block, **thresholds: float) -> bool:
    """Whether rule ``code`` has nothing to say."""
    found = findings(code, *blocks, **thresholds)
    assert found == (), [f.message for f in found]
    return True


def place(finding: Finding) -> tuple[str | None, Severity, str | None, int | None, int | None]:
    """Cause, severity, layer, task and step."""
    return finding.cause, finding.severity, finding.layer, finding.task, finding.step
