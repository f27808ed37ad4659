"""Show blocks to rules, remember tasks between blocks, and fold findings by rule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from divergence_probe.record.schema import SUPPORT, Array, Block
from divergence_probe.rules.base import Frame, Rule, TaskFacts, missing_to_nan
from divergence_probe.rules.finding import Finding
from divergence_probe.rules.selection import Selection
from divergence_probe.thresholds import Thresholds


class Engine:
    """Runs rules over blocks in order; the same live and over a recording.

    Args:
        rules: rule classes to run.
        selection: which findings are kept.
        thresholds: the numbers in force.
    """

    def __init__(
        self,
        rules: Iterable[type[Rule]],
        selection: Selection | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        self.selection = selection or Selection()
        self.thresholds = thresholds or Thresholds()
        running = [rule for rule in rules if self.selection.runs(rule)]
        self._each_rank = [rule for rule in running if not rule.across_ranks]
        self._of_rank: dict[int, list[Rule]] = {}
        self._across = [rule(self.thresholds) for rule in running if rule.across_ranks]
        self._tasks: dict[tuple[int, int], TaskFacts] = {}
        self._folded: dict[tuple[object, ...], Finding] = {}
        self._last_task: dict[tuple[object, ...], int | None] = {}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings so far, folded by rule, the most severe and earliest first."""
        return tuple(
            sorted(
                self._folded.values(),
                key=lambda f: (-f.severity, _late(f.task), _late(f.step), f.rule),
            )
        )

    def feed(self, block: Block) -> list[Finding]:
        """Run every rule over ``block``; returns findings of a kind not seen before."""
        frame = self._frame(block)
        rules = (*self._rules(block.rank), *self._across)
        fresh = [f for rule in rules for f in rule.check(frame) if self._fold(f)]
        self._forget(block)
        return fresh

    def finish(self) -> list[Finding]:
        """Run what rules have to say at the end of the run."""
        rules = [rule for own in self._of_rank.values() for rule in own] + self._across
        return [f for rule in rules for f in rule.finish() if self._fold(f)]

    def _rules(self, rank: int) -> list[Rule]:
        """What a rule remembers of one rank's tasks says nothing of another's: one each."""
        if rank not in self._of_rank:
            self._of_rank[rank] = [rule(self.thresholds) for rule in self._each_rank]
        return self._of_rank[rank]

    def add(self, finding: Finding) -> bool:
        """Fold in a finding that comes from elsewhere (forensics, exceptions)."""
        return self._fold(finding)

    def _fold(self, finding: Finding) -> bool:
        """Whether ``finding`` is the first of its kind; later ones only raise the count."""
        if not self.selection.keeps(finding):
            return False
        key = (finding.rule, finding.cause, finding.rank)
        first = self._folded.get(key)
        if first is None:
            self._folded[key] = finding
            return True
        layers = first.layers + tuple(x for x in finding.layers if x not in first.layers)
        worse = finding.severity > first.severity
        kept = finding if worse else first
        # A task that is long, or in which several layers are concerned, is still one task.
        again = finding.unit == "task" and finding.task == self._last_task.get(key, first.task)
        self._last_task[key] = finding.task
        self._folded[key] = replace(
            kept,
            count=first.count + (0 if again else finding.count),
            layers=layers,
            unit=first.unit if first.unit == finding.unit else "time",
        )
        return worse

    def _frame(self, block: Block) -> Frame:
        rank = block.rank
        for event in block.events_of("task-start"):
            for index in range(event.task, event.task + int(event.data.get("width", 1))):
                self._tasks[rank, index] = TaskFacts(index, event.data, event.site)
        facts = {index: self._facts(rank, index) for index in block.by_task.tasks if index >= 0}
        start, growth, first_loss = self._histories(block, facts)
        return Frame(block, facts, start, growth, first_loss)

    def _facts(self, rank: int, index: int) -> TaskFacts:
        facts = self._tasks.get((rank, index))
        if facts is None:
            facts = self._tasks[rank, index] = TaskFacts(index)
        return facts

    def _histories(self, block: Block, facts: dict[int, TaskFacts]) -> tuple[Array, Array, Array]:
        """``[S, P]`` start norms and growth and ``[S]`` first loss, each of the row's task."""
        self._begin(block, facts)
        by_task, after = block.by_task, missing_to_nan(block.parameters["norm_after"])
        known = [facts.get(index) or TaskFacts(index) for index in by_task.tasks]
        start = _table([task.start_norms for task in known], after.shape[1])
        references = _table([task.references for task in known], after.shape[1])
        first_loss = np.asarray([task.first_loss for task in known])
        with np.errstate(all="ignore"):
            growth = after / references[by_task.of_row]
        return start[by_task.of_row], growth, first_loss[by_task.of_row]

    def _begin(self, block: Block, facts: dict[int, TaskFacts]) -> None:
        """Note where tasks begin whose first step, or first loss, is in this block."""
        support = block.scalars["phase"] == SUPPORT
        first = block.by_task.first(support)
        first_seen = block.by_task.first(support & (block.scalars["loss_seen"] > 0))
        # (the values of tasks without such a row are another row's, and not used)
        start = missing_to_nan(block.parameters["norm_before"][first])
        references = self._references(start, missing_to_nan(block.parameters["norm_after"][first]))
        losses = block.scalars["loss"][first_seen].tolist()
        rows = zip(first.tolist(), first_seen.tolist(), strict=True)
        for position, (step, seen) in enumerate(rows):
            task = facts.get(block.by_task.tasks[position])
            if task is None:
                continue
            if task.start_norms is None and step >= 0:
                task.start_norms, task.references = start[position], references[position]
            if math.isnan(task.first_loss) and seen >= 0:
                task.first_loss = losses[position]

    def _references(self, start: Array, first: Array) -> Array:
        """``[T, P]`` the norms growth is measured against.

        A parameter's own norm when the task began; for those smaller than most (zero-initialised
        heads, biases) the median of all, a fraction of the whole model's norm, or what the first
        step made of them, whichever is the largest.
        """
        first = np.where(np.isfinite(first), first, 0.0)
        with np.errstate(over="ignore"):
            whole = np.sqrt(np.nansum(start**2, axis=1))
            whole = np.where(whole == 0, np.sqrt(np.sum(first**2, axis=1)), whole)
            median = _medians(start)
        floor = np.maximum(self.thresholds["small-parameter"] * whole, median)[:, None]
        own = np.fmax(start, np.fmax(floor, first))
        return np.fmax(np.where(start >= np.maximum(floor, 1e-12), start, own), 1e-12)

    def _forget(self, block: Block) -> None:
        """Tasks that ended are not needed any more; a recording may hold a million."""
        for event in block.events_of("task-end"):
            task = self._tasks.pop((block.rank, event.task), None)
            width = int(task.data.get("width", 1)) if task is not None else 1
            for other in range(event.task + 1, event.task + width):
                self._tasks.pop((block.rank, other), None)


def _table(rows: list[Array | None], width: int) -> Array:
    """``[T, P]`` of rows; nan where there is none, or one of another model."""
    nothing = np.full(width, np.nan)
    fitting = [nothing if row is None or len(row) != width else row for row in rows]
    return np.asarray(fitting).reshape(len(rows), width)


def _medians(values: Array) -> Array:
    """``[T]`` the median of each row's finite values; 0 where it has none."""
    if not values.size:
        return np.zeros(len(values))
    finite = np.isfinite(values)
    count = finite.sum(1)
    ordered = np.sort(np.where(finite, values, np.inf), axis=1)
    row = np.arange(len(values))
    upper, lower = ordered[row, count // 2], ordered[row, (count - 1) // 2]
    return np.where(count == 0, 0.0, np.where(count % 2, lower, (lower + upper) / 2))


def _late(index: int | None) -> float:
    return float("inf") if index is None else index
