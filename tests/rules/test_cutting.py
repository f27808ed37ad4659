"""Rules look at whole blocks at once; where a run is cut into blocks must not matter to them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from divergence_probe.diagnosis.collector import Collector
from divergence_probe.record.schema import Block, Event
from divergence_probe.record.task_rows import TaskRows
from divergence_probe.rules.base import Frame, once_a_frame
from divergence_probe.rules.engine import Engine

from .blocks import INF, NAN, Row, end, evaluated, inner, make, outer, query, rule, start, train

CODES = (
    "BASE001", "BN001", "BN003", "BN005", "LG001", "LR001", "LR003", "MG001", "MG002", "MG003",
    "MODE001", "MODE002", "NF001", "NF002",
)  # fmt: skip
FAULTS = (
    "", "statistics", "leak", "goes-on", "explodes", "climbs", "moves", "nan", "modes", "switched",
)  # fmt: skip


def steps(task: int, fault: str) -> list[Row]:
    """Four inner steps and a query; one thing is wrong."""
    layer = evaluated(bn_untrained=1, bn_mean_distance=9) if fault == "statistics" else train()
    if fault in ("leak", "goes-on"):
        layer |= {"bn_shared": 1, "bn_running_mean_before": task, "bn_running_mean_after": task + 1}
    rows = []
    for step in range(4):
        row = inner(task, step, loss=1 - step / 10, norm_before=10 + step, norm_after=11 + step)
        row |= layer
        if fault == "explodes":
            row |= {"loss": 4.0**step, "gradient_norm": 2.0**step, "flags": 1}
            row |= {"instability": 12.0 if step else NAN}
            row |= {"norm_before": 10 * 9.0**step, "norm_after": 10 * 9.0 ** (step + 1)}
        elif fault == "climbs":
            row |= {"loss": 1.0 + step, "step_rate": -0.1, "learning_rate": -0.1}
        elif fault == "goes-on":
            row |= {"norm_before": 10 + 4 * task + step, "norm_after": 11 + 4 * task + step}
        elif fault == "moves":
            row |= {"norm_before": 12 + step, "norm_after": 13 + step}
        elif fault == "nan" and step == 3:
            row |= {"loss": NAN}
        rows.append(row)
    mode = evaluated() if fault == "modes" else layer
    return [*rows, query(task, site=-1 if fault else 1, **mode)]


def run(faults: list[str], gradient: float | None) -> tuple[list[Row], list[Event]]:
    """Rows in order, and the events that belong to them; a row a second.

    Outer steps, after every other task, have gradients of this norm; None for no outer steps.
    """
    rows: list[Row] = []
    events = []
    for task, fault in enumerate(faults):
        events.append(start(task, float(len(rows))))
        if fault == "switched":
            data = {"target": "base", "mode": "eval", "was": "train"}
            events.append(Event("mode", task, 1, len(rows) + 1.0, "train.py:7", data))
        rows += steps(task, fault)
        events.append(end(task, len(rows) - 1.0))
        if gradient is not None and task % 2:
            rows.append(outer(norm_before=10, gradient_norm=gradient))
            events.append(Event("outer-step", -1, -1, len(rows) - 1.0, None, {}))
    return rows, events


def cut(rows: list[Row], events: list[Event], size: int) -> list[Block]:
    """The same run in blocks of ``size`` rows."""
    blocks = []
    for begin in range(0, len(rows), size):
        last = min(begin + size, len(rows)) - 1
        here = [e for e in events if begin - 1 < e.seconds <= last]
        block = make(*rows[begin : last + 1], batch_norms=["norm"], events=here, since=float(begin))
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("gradient", [None, 1.0, -1.0, INF, 1e9])
@pytest.mark.parametrize("fault", FAULTS)
def test_findings_do_not_depend_on_where_blocks_end(fault: str, gradient: float | None) -> None:
    rows, events = run(["", fault, fault, "", fault], gradient)
    found = []
    for size in (1, 3, len(rows)):
        rules = Engine([rule(code) for code in CODES])
        for block in cut(rows, events, size):
            rules.feed(block)
        rules.finish()
        found.append([repr(finding) for finding in rules.findings])
        assert rules._tasks == {}

    assert found[0] == found[1] == found[2]
    assert bool(found[0]) or not fault


def test_the_numbers_of_a_report_do_not_either() -> None:
    rows, events = run(["", "explodes", "modes", "climbs"], 1.0)
    told = []
    for size in (1, 3, len(rows)):
        collector = Collector()
        for block in cut(rows, events, size):
            collector.feed(block)
        parts = collector.health(), collector.norms(), collector.batch_norm(), collector.summary()
        told.append(repr(parts))

    assert told[0] == told[1] == told[2]


def test_rows_by_task_when_tasks_lie_in_one_another() -> None:
    task = np.asarray([4.0, 2.0, 4.0, -1.0, 2.0, 4.0, 7.0])
    rows = TaskRows(task)
    chosen = np.asarray([False, True, True, False, True, True, False])

    assert rows.tasks == [-1, 2, 4, 7] and len(rows) == 4
    assert [rows.rows(i).tolist() for i in range(4)] == [[3], [1, 4], [0, 2, 5], [6]]
    assert rows.first(chosen).tolist() == [-1, 1, 2, -1]
    assert rows.last(chosen).tolist() == [-1, 4, 5, -1]
    assert rows.previous(chosen).tolist() == [-1, -1, -1, -1, 1, 2, -1]
    assert rows.any(chosen).tolist() == [False, True, True, False]
    assert rows.count(chosen).tolist() == [0, 2, 2, 0]
    assert rows.reduced(np.maximum, np.arange(7)).tolist() == [3, 4, 5, 6]


def test_rows_of_an_empty_block() -> None:
    rows = TaskRows(np.empty(0))
    nothing = np.zeros(0, dtype=bool)

    assert (
        rows.tasks == [] and rows.first(nothing).tolist() == rows.previous(nothing).tolist() == []
    )
    assert rows.reduced(np.maximum, np.empty((0, 3))).shape == (0, 3)


def test_histories_of_tasks_that_lie_in_one_another_and_of_one_not_begun() -> None:
    rules = Engine([])
    rows = [
        inner(0, norm_before=[10, 8, 0], norm_after=[20, 8, 4], loss=3.0),
        inner(1, norm_before=[5, 5, 5], norm_after=[5, 10, 5], loss_seen=0),
        inner(0, 1, norm_after=[30, 8, 8], loss=2.0),
        query(2),
    ]
    frame = rules._frame(make(*rows, outer(), events=[start(0), start(1), start(2)]))

    nothing = [NAN, NAN, NAN]
    begun = [[10, 8, 0], [5, 5, 5], [10, 8, 0], nothing, nothing]
    np.testing.assert_array_equal(frame.start_norm, begun)
    np.testing.assert_array_equal(frame.first_loss, [3.0, NAN, 3.0, NAN, NAN])
    grown = [[2, 1, 0.5], [1, 2, 1], [3, 1, 1], nothing, nothing]
    np.testing.assert_allclose(frame.growth, grown)


def test_what_rules_share_is_computed_once() -> None:
    asked = []

    @once_a_frame
    def size(frame: Frame, column: str) -> np.ndarray:
        asked.append(column)
        return frame.block.parameters[column].sum(1)

    frame = Engine([])._frame(make(inner()))

    assert size(frame, "norm_after") is size(frame, "norm_after")
    assert size(frame, "norm_before") is not size(frame, "norm_after")
    assert asked == ["norm_after", "norm_before"]
    assert size(dataclasses.replace(frame, shared={}), "norm_after").tolist() == [30.0]
