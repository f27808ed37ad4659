"""Which inner loops are recorded exactly: every cell a small real loop that knows its own truth.

``python -m tests.coverage_matrix`` runs them all and writes ``docs/coverage.md``. A loop notes, for
each of its tasks and steps, the loss and every parameter's norm before and after, and the latter
for its outer steps, too; a cell is

* ``exact`` where the recording says the same to 1e-6,
* ``incomplete`` where something is missing and the recording itself says so,
* ``WRONG`` otherwise.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import divergence_probe
from divergence_probe.record.reader import Recording
from divergence_probe.record.schema import FLAGS
from tests.coverage_loops import (
    by_hand,
    on_one_model,
    torch_functions,
    torch_optimizers,
    with_libraries,
)
from tests.coverage_loops.notes import Notes, Outer, Step

TOLERANCE = 1e-6
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
_ADMITTED = FLAGS["incomplete"] | FLAGS["uncertain"]


@dataclass(frozen=True)
class Cell:
    """One way to write an inner loop."""

    library: str
    style: str
    order: str
    optimizer: str
    loop: Callable[[Notes], None]

    def __str__(self) -> str:
        return f"{self.library}: {self.style}, {self.order} order, {self.optimizer}"


@dataclass(frozen=True)
class Result:
    """How a cell was recorded, and the first thing that differs."""

    verdict: str
    detail: str = ""


def cells() -> list[Cell]:
    """Every cell whose library is installed."""
    groups: list[tuple[str, Iterable[tuple[str, str, str, Any]]]] = [
        ("by hand", by_hand.cells()),
        ("torch.func", torch_functions.cells()),
        ("by hand", on_one_model.cells()),
        ("torch.optim", torch_optimizers.cells()),
    ]
    groups += [(name, with_libraries.cells(name)) for name in with_libraries.LIBRARIES]
    return [Cell(library, *parts) for library, found in groups for parts in found]


def run(cell: Cell) -> Result:
    """Run a cell's loop under the probe and compare."""
    torch.manual_seed(0)
    notes = Notes()
    prepare = getattr(cell.loop, "prepare", None)
    if prepare is not None:
        prepare(notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with divergence_probe.attach() as probe:
            cell.loop(notes)
    if probe.failure is not None:
        return Result("WRONG", f"the probe failed: {probe.failure}")
    return compare(notes, probe.recording)


def compare(notes: Notes, recording: Recording) -> Result:
    """Judge a recording by what the loop noted."""
    recorded = _recorded(recording)
    admitted = any(event.kind == "incomplete" for event in recording.events())
    missing = ""
    shape = [len(steps) for steps in notes.tasks]
    if [len(steps) for steps in recorded] != shape:
        detail = f"steps of tasks {[len(steps) for steps in recorded]} for {shape}"
        return Result("incomplete" if admitted else "WRONG", detail)
    for task, (steps, rows) in enumerate(zip(notes.tasks, recorded, strict=True)):
        for number, (step, row) in enumerate(zip(steps, rows, strict=True)):
            wrong, absent = _differences(step, row)
            where = f"task {task}, step {number}: "
            if wrong and not row.flags & _ADMITTED:
                return Result("WRONG", where + wrong)
            if absent and not (row.flags & _ADMITTED or admitted):
                return Result("WRONG", where + absent + ", unsaid")
            if (wrong or absent) and not missing:
                missing = where + (wrong or absent)
    if notes.outer_steps:
        wrong = _outer_differences(notes.outer_steps, _recorded_outer(recording))
        if wrong:
            return Result("WRONG", wrong)
    return Result("incomplete", missing) if missing else Result("exact")


def _outer_differences(noted: list[Outer], recorded: list[Outer]) -> str:
    """The first thing that is wrong with the outer steps; they must come in the right order."""
    begun = [step.tasks for step in noted]
    if [step.tasks for step in recorded] != begun:
        return f"outer steps after {[step.tasks for step in recorded]} tasks for {begun}"
    for number, (step, row) in enumerate(zip(noted, recorded, strict=True)):
        for what, mine, theirs in (
            ("before", step.before, row.before),
            ("after", step.after, row.after),
        ):
            theirs = _as_named(theirs, mine)
            for name, value in mine.items():
                other = theirs.get(name, math.nan)
                same = math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=1e-12)
                if not same and not (math.isnan(value) and math.isnan(other)):
                    return f"outer step {number}: {what} {name} {other:.9g} for {value:.9g}"
    return ""


def _recorded_outer(recording: Recording) -> list[Outer]:
    steps: list[Outer] = []
    tasks: set[int] = set()
    for block in recording.blocks():
        names = [info.name for info in block.layout.parameters]
        for row in range(len(block)):
            task = int(block.scalars["task"][row])
            if task >= 0:
                tasks.add(task)
            else:
                columns = (block.parameters[name][row] for name in ("norm_before", "norm_after"))
                before, after = (dict(zip(names, map(float, c), strict=True)) for c in columns)
                steps.append(Outer(len(tasks), before, after))
    return steps


@dataclass
class _Row:
    """One recorded step."""

    loss: float
    flags: int
    before: dict[str, float]
    after: dict[str, float]


def _recorded(recording: Recording) -> list[list[_Row]]:
    flags: dict[tuple[int, int], int] = {}
    for block in recording.blocks():
        for row in range(len(block)):
            if block.scalars["phase"][row] == 0:
                key = int(block.scalars["task"][row]), int(block.scalars["step"][row])
                flags[key] = int(block.scalars["flags"][row])
    table = recording.steps()
    table = table[table["phase"] == "support"]
    tasks: dict[int, list[_Row]] = {}
    for (task, step), rows in table.groupby(["task", "step"], sort=True):
        present = rows[rows["norm_before"].notna() | rows["norm_after"].notna()]
        rows = present if len(present) else rows
        tasks.setdefault(int(task), []).append(
            _Row(
                float(rows["loss"].iloc[0]),
                flags[int(task), int(step)],
                _column(rows, "norm_before"),
                _column(rows, "norm_after"),
            )
        )
    return [tasks[task] for task in sorted(tasks)]


def _column(rows: pd.DataFrame, name: str) -> dict[str, float]:
    return dict(zip(rows["parameter"], rows[name].astype(float), strict=True))


def _differences(step: Step, row: _Row) -> tuple[str, str]:
    """The first number that is wrong, and the first that is missing."""
    wrong = absent = ""
    for what, mine, theirs in (
        ("loss", {"": step.loss}, {"": row.loss}),
        ("before", step.before, row.before),
        ("after", step.after, row.after),
    ):
        theirs = _as_named(theirs, mine)
        for name, value in mine.items():
            other = theirs.get(name, math.nan)
            if math.isnan(value):  # the loop's own number, on some processors
                wrong = (
                    wrong if math.isnan(other) else wrong or f"{what} {name} {other:.9g} for nan"
                )
            elif math.isnan(other):
                absent = absent or f"{what} {name} missing"
            elif not math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=1e-12):
                wrong = wrong or f"{what} {name} {other:.9g} for {value:.9g}"
        extra = [name for name in theirs if name not in mine and not math.isnan(theirs[name])]
        if extra:
            wrong = wrong or f"{what} of {extra[0]}, which did not take part"
    return wrong, absent


def _as_named(recorded: dict[str, float], own: dict[str, float]) -> dict[str, float]:
    """Recorded values under the loop's own names.

    Where no module owns the tensors they are named by position, and parts of a module by their
    names in that part.
    """
    if len(recorded) != len(own) or set(recorded) == set(own):
        return recorded
    named = zip(recorded, own, strict=True)
    if all(theirs.startswith("param[") or mine.endswith(f".{theirs}") for theirs, mine in named):
        return dict(zip(own, recorded.values(), strict=True))
    return recorded


def page(results: dict[Cell, Result]) -> str:
    """The matrix as Markdown."""
    counts = {v: sum(r.verdict == v for r in results.values()) for v in _VERDICTS}
    lines = [
        "# What is recorded exactly",
        "",
        "Written by `python -m tests.coverage_matrix`, which runs a small real loop for each row;",
        "the loop notes its own losses and norms, and the recording is compared with them to 1e-6:",
        "inner steps, and where the loop notes them outer steps, in their order among the tasks.",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".",
        "",
        "| Library | Style | Order | Optimizer | Recorded |",
        "| --- | --- | --- | --- | --- |",
    ]
    for cell, result in results.items():
        detail = f": {result.detail}" if result.detail else ""
        parts = (cell.library, cell.style, cell.order, cell.optimizer, result.verdict + detail)
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


_VERDICTS = ("exact", "incomplete", "WRONG")


def main() -> int:
    """Run every cell, write the page, and say what is not exact."""
    torch.set_num_threads(1)
    results = {cell: run(cell) for cell in cells()}
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results), encoding="utf-8")
    for cell, result in results.items():
        if result.verdict != "exact":
            print(f"{result.verdict}: {cell}: {result.detail}")
    print({v: sum(r.verdict == v for r in results.values()) for v in _VERDICTS})
    return any(result.verdict == "WRONG" for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
