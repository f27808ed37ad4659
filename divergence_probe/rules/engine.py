"""Show blocks to rules, remember tasks between blocks, and fold findings by rule."""

from __future__ import annotations

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
        for event in block.events:
            if event.kind == "task-start":
                for offset in range(int(event.data.get("width", 1))):
                    index = event.task + offset
                    self._tasks[rank, index] = TaskFacts(index, event.data, event.site)
        indices = {int(task) for task in np.unique(block.scalars["task"])}
        facts = {
            index: self._tasks.setdefault((rank, index), TaskFacts(index))
            for index in indices
            if index >= 0
        }
        start, growth = self._histories(block, facts)
        return Frame(
            block,
            facts,
            start,
            growth,
            np.asarray([_first_loss(facts, task) for task in block.scalars["task"]]),
        )

    def _histories(self, block: Block, facts: dict[int, TaskFacts]) -> tuple[Array, Array]:
        """Fill in start norms and losses; ``[S, P]`` start norms and growth by row."""
        before = missing_to_nan(block.parameters["norm_before"])
        after = missing_to_nan(block.parameters["norm_after"])
        start = np.full_like(before, np.nan)
        growth = np.full_like(before, np.nan)
        tasks, losses = block.scalars["task"], block.scalars["loss"]
        support = block.scalars["phase"] == SUPPORT
        seen = block.scalars["loss_seen"] > 0
        for index, task in facts.items():
            rows = tasks == index
            steps = np.flatnonzero(rows & support)
            if len(steps):
                if task.start_norms is None:
                    task.start_norms = before[steps[0]]
                    task.references = self._references(before[steps[0]], after[steps[0]])
                with_loss = steps[seen[steps]]
                if len(with_loss):
                    if np.isnan(task.first_loss):
                        task.first_loss = float(losses[with_loss[0]])
                    task.last_loss = float(losses[with_loss[-1]])
            if task.start_norms is not None and len(task.start_norms) == start.shape[1]:
                start[rows] = task.start_norms
                with np.errstate(all="ignore"):
                    growth[rows] = after[rows] / task.references
        return start, growth

    def _references(self, start: Array, first: Array) -> Array:
        """``[P]`` the norms growth is measured against.

        A parameter's own norm when the task began; for those smaller than most (zero-initialised
        heads, biases) the median of all, a fraction of the whole model's norm, or what the first
        step made of them, whichever is the largest.
        """
        first = np.where(np.isfinite(first), first, 0.0)
        whole = np.sqrt(np.nansum(start**2)) or np.sqrt(np.sum(first**2))
        known = start[np.isfinite(start)]
        median = float(np.median(known)) if len(known) else 0.0
        floor = max(self.thresholds["small-parameter"] * whole, median)
        own = np.fmax(start, np.fmax(floor, first))
        return np.fmax(np.where(start >= max(floor, 1e-12), start, own), 1e-12)

    def _forget(self, block: Block) -> None:
        """Tasks that ended are not needed any more; a recording may hold a million."""
        for event in block.events:
            if event.kind == "task-end":
                width = int(
                    self._tasks.get((block.rank, event.task), TaskFacts(0)).data.get("width", 1)
                )
                for offset in range(width):
                    self._tasks.pop((block.rank, event.task + offset), None)


def _first_loss(facts: dict[int, TaskFacts], task: float) -> float:
    known = facts.get(int(task))
    return known.first_loss if known is not None else float("nan")


def _late(index: int | None) -> float:
    return float("inf") if index is None else index
