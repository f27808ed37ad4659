"""``--confirm``: run the script again, as a control and with one thing changed at a time.

Each re-run is a process of its own, at the first run's working directory and arguments, with an
empty standard input and its output thrown away. It stops as soon as the task in question ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import divergence_probe
from divergence_probe import rerun
from divergence_probe.diagnosis import confirm
from divergence_probe.diagnosis.analysis import Analysis
from divergence_probe.diagnosis.confirm import CONTROL, Measured
from divergence_probe.diagnosis.diagnosis import Diagnosis, Intervention
from divergence_probe.record.reader import Recording
from divergence_probe.record.schema import MISSING, OUTER, SUPPORT, Array, Block
from divergence_probe.replay import replay
from divergence_probe.rules.finding import Finding
from divergence_probe.rules.selection import Selection
from divergence_probe.runner import Target
from divergence_probe.thresholds import Thresholds

# A re-run watches the same script for at most as long; imports and a busy machine come on top.
_TIMES_THE_RUN = 3.0
_SECONDS_MORE = 60.0

_ERRORS = "stderr"

# As `python -m`, but a module of the working directory must not stand in for one of ours.
_BOOT = """
import sys
own = [] if getattr(sys.flags, "safe_path", sys.flags.isolated) else [sys.path.pop(0)]
try:
    import divergence_probe.rerun
except ImportError:
    sys.path.append(sys.argv[2])
    import divergence_probe.rerun
sys.path[:0] = own
sys.exit(divergence_probe.rerun.main(sys.argv[1]))
"""


@dataclass(frozen=True)
class Rerun:
    """What every re-run has in common.

    Attributes:
        target: the script or module with its arguments.
        directory: working directory the first run began in.
        timeout: seconds for one re-run.
        selection: the first run's declared intent counts in the re-runs too.
        thresholds: overrides by name.
    """

    target: Target
    directory: str
    timeout: float
    selection: Selection
    thresholds: dict[str, float]


@dataclass(frozen=True)
class Goal:
    """Where a re-run stops, and what it looks at there.

    Attributes:
        rank: of the process.
        task: index of the task, or None.
        outer: number of outer steps to wait for, or None; with neither, the script runs to its end.
        sites: the user's lines at which inner steps were taken.
    """

    rank: int
    task: int | None
    outer: int | None
    sites: tuple[str, ...]


def default_timeout(seconds: float) -> float:
    """Seconds for one re-run, after a first run of ``seconds``."""
    return _TIMES_THE_RUN * seconds + _SECONDS_MORE


def confirmed(
    first: Diagnosis,
    recording: Recording,
    common: Rerun,
    say: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """The first run's diagnosis with the re-runs, its root cause confirmed if they prove it.

    Args:
        first: the diagnosis to prove.
        recording: of the first run.
        common: how to run again.
        say: told what is going on and what came out, in lines for a person.
    """
    symptom = confirm.symptom(first)
    names = confirm.plan(first)
    if symptom is None or not names:
        say(_nothing(first))
        return first
    goal = _goal(recording, symptom, common, first.verdict == "diverged")
    with tempfile.TemporaryDirectory(prefix="divergence-probe-confirm-") as folder:
        runs, read_input = _run_all(Path(folder), names, goal, common, first, say)
    if read_input:
        say(
            "the script read from standard input, which is empty in the re-runs of --confirm; "
            "let it read a file instead to have them see the same"
        )
    ruling = confirm.judge(first, runs)
    cause = first.root_cause
    assert cause is not None
    if ruling.confirmed:
        cause = replace(cause, confidence="confirmed")
    else:
        say(f"{cause.cause} is not confirmed: {ruling.reason}.")
    return replace(first, root_cause=cause, interventions=_told(first, runs))


def _nothing(first: Diagnosis) -> str:
    cause = first.root_cause
    if first.verdict not in ("diverged", "suspect"):
        return f"--confirm: the run is {first.verdict}, there is nothing to prove."
    if cause is None:
        return "--confirm: no root cause was inferred, so there is nothing to prove."
    return f"--confirm: no intervention can prove {cause.cause}; nothing was run again."


def _run_all(
    folder: Path,
    names: Sequence[str],
    goal: Goal,
    common: Rerun,
    first: Diagnosis,
    say: Callable[[str], None],
) -> tuple[dict[str, Measured], bool]:
    runs: dict[str, Measured] = {}
    read_input = False
    for number, name in enumerate((CONTROL, *names)):
        say(f"--confirm: run {number + 1} of {len(names) + 1}, {name}")
        own = folder / str(number)
        own.mkdir()
        runs[name] = _run(own, name, goal, common)
        if runs[name].ended == "failed":
            say(f"--confirm: the script failed with {name}: {_last_line(own / _ERRORS)}")
        read_input |= (own / rerun.STDIN_READ).exists()
        if name == CONTROL and confirm.outcome(runs[name], first) not in ("diverged", "as before"):
            break  # nothing can be proved against it
    return runs, read_input


def _run(folder: Path, name: str, goal: Goal, common: Rerun) -> Measured:
    """One re-run, measured."""
    task = {**asdict(common.target), **asdict(goal)}
    task["intervention"] = None if name == CONTROL else name
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    root = str(Path(divergence_probe.__file__).parents[1])
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    started = time.perf_counter()
    with open(folder / _ERRORS, "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", _BOOT, str(folder), root],
            cwd=common.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        code: int | None = process.wait(common.timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)
    return _measure(folder / rerun.RECORDING, goal, common, code, time.perf_counter() - started)


def _last_line(file: Path) -> str:
    """What a script that failed said last."""
    lines = file.read_bytes()[-4000:].decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a re-run with all it started: data loaders outlive a process that just leaves."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


# -- measuring -------------------------------------------------------------------------------------


def _goal(recording: Recording, symptom: Finding, common: Rerun, diverged: bool) -> Goal:
    """Where to stop: at an explosion's own task; else where the finding can be made again.

    Some rules see a fault only tasks later, or from the whole run; and a meta-gradient's fault is
    seen at an outer step.
    """
    sites: set[str] = set()
    analysis = Analysis(common.selection, Thresholds(common.thresholds))
    outer = task = -1
    outer_steps, found = 0, False
    for block in recording.blocks():
        phases = block.scalars["phase"]
        support = phases == SUPPORT
        sites |= {block.sites[int(n)] for n in np.unique(block.scalars["site"][support]) if n >= 0}
        if found or block.rank != symptom.rank:
            continue
        analysis.feed(block)
        outer_steps += int((phases == OUTER).sum())
        if support.any():
            task = max(task, int(block.scalars["task"][support].max()))
        if any(_same(finding, symptom) for finding in analysis.engine.findings):
            found, outer = True, outer_steps
    lines = tuple(sorted(sites))
    if symptom.task is not None and diverged:
        return Goal(symptom.rank, symptom.task, None, lines)
    if symptom.task is None and found and outer:
        return Goal(symptom.rank, None, outer, lines)
    return Goal(symptom.rank, task if found and task >= 0 else None, None, lines)


def _same(one: Finding, other: Finding) -> bool:
    return (one.rule, one.cause, one.rank) == (other.rule, other.cause, other.rank)


def _measure(folder: Path, goal: Goal, common: Rerun, code: int | None, seconds: float) -> Measured:
    if not (folder / "meta.json").exists():
        return Measured("timed out" if code is None else "failed", seconds=seconds)
    recording = Recording(folder)
    numbers = _Numbers(goal)
    for block in recording.blocks():
        numbers.feed(block)
    ended = "reached" if numbers.reached or (goal.task is None and goal.outer is None) else ""
    if code is None and not numbers.reached:
        ended = "timed out"
    elif not ended:
        ended = "not reached" if code == 0 else "failed"
    findings = replay(recording, common.selection, common.thresholds).findings
    return replace(numbers.measured(), ended=ended, findings=findings, seconds=seconds)


class _Numbers:
    """What a recording says of the task in question (of the last outer step, where that is it)."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._outer = 0
        self._start: Array | None = None
        self._first: Array | None = None
        self._end: Array | None = None
        self._names: list[str] = []
        self._losses: list[float] = []
        self._instability = math.nan
        self.reached = False

    def feed(self, block: Block) -> None:
        """Take one block."""
        goal, scalars = self._goal, block.scalars
        for row in self._rows(block):
            self._outer += int(scalars["phase"][row] == OUTER)
            if self._start is None:
                self._start = block.parameters["norm_before"][row]
                self._first = block.parameters["norm_after"][row]
            self._end = block.parameters["norm_after"][row]
            self._names = [info.name for info in block.layout.parameters]
            if scalars["phase"][row] == SUPPORT:
                if scalars["loss_seen"][row]:
                    self._losses.append(float(scalars["loss"][row]))
                self._instability = float(scalars["instability"][row])
        self.reached |= goal.outer is not None and self._outer >= goal.outer
        self.reached |= goal.task is not None and any(
            event.kind == "task-end" and event.task <= goal.task for event in block.events
            if self._start is not None
        )  # fmt: skip

    def _rows(self, block: Block) -> Iterator[int]:
        phases = block.scalars["phase"]
        if self._goal.task is not None:
            wanted = (block.scalars["task"] == self._goal.task) & (phases == SUPPORT)
        else:
            wanted = phases == OUTER
        yield from (int(row) for row in np.flatnonzero(wanted))

    def measured(self) -> Measured:
        """The numbers."""
        if self._start is None or self._first is None or self._end is None:
            return Measured("")
        if len(self._start) != len(self._end):
            return Measured("")
        held = (self._start != MISSING) & (self._end != MISSING)
        if not held.any():
            return Measured("")
        end = np.where(held, self._end, -1.0)
        worst = int(np.argmax(np.where(np.isnan(end), np.inf, end)))
        # As the rules do: a small parameter against the model's norm, or what one step made of it.
        floor = 0.03 * math.sqrt(float(np.nansum(np.where(held, self._start, 0.0) ** 2)))
        small = np.fmax(floor, np.where(np.isfinite(self._first), self._first, 0.0))
        reference = np.where(self._start >= max(floor, 1e-12), self._start, small)
        with np.errstate(all="ignore"):
            growth = np.where(held, end / np.fmax(reference, 1e-12), 0.0)
        return Measured(
            "",
            largest_norm=float(end[worst]),
            layer=self._names[worst],
            growth=float(np.max(np.where(np.isnan(growth), np.inf, growth))),
            losses=tuple(self._losses),
            instability=self._instability,
        )


def _told(first: Diagnosis, runs: dict[str, Measured]) -> tuple[Intervention, ...]:
    """The runs as the report shows them: the control, then the cause's own, stable ones first."""
    from divergence_probe.observe.interventions.registry import all_interventions

    known: dict[str, Any] = dict(all_interventions())
    cause = first.root_cause
    own = confirm.PROOFS.get(cause.cause, ()) if cause is not None else ()

    def order(name: str) -> tuple[bool, bool, bool]:
        return name != CONTROL, name not in own, outcomes[name] != "stable"

    outcomes = {name: confirm.outcome(run, first) for name, run in runs.items()}
    return tuple(
        Intervention(
            name,
            "nothing changed" if name == CONTROL else known[name].description,
            outcomes[name],
            runs[name].largest_norm,
            runs[name].layer,
            round(runs[name].seconds, 2),
        )
        for name in sorted(runs, key=order)
    )
