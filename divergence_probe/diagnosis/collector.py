"""The numbers behind a report, gathered block by block: what was watched and how it behaved."""

from __future__ import annotations

import math

import numpy as np

from divergence_probe.diagnosis.diagnosis import BatchNormRow, Health, NormTrace, Summary
from divergence_probe.diagnosis.layers import WatchedLayers
from divergence_probe.diagnosis.normalization import NormalizationLayers
from divergence_probe.diagnosis.stability_margin import StabilityMargin
from divergence_probe.diagnosis.worst_task import WorstTask
from divergence_probe.record.schema import FLAGS, SUPPORT, Array, Block, Flags


class Collector:
    """Small running state over any number of blocks.

    Keeps the norms of one task only: the one whose parameters grew most.
    """

    def __init__(self) -> None:
        self.tasks = 0
        self.inner_steps = 0
        self.outer_steps = 0
        self.ranks: set[int] = set()
        self._watched = WatchedLayers()
        self.adapters: dict[str, None] = {}
        self.optimizers: dict[str, None] = {}
        self.incomplete: dict[str, None] = {}
        self._rates: list[float] = []
        self._norms = WorstTask()
        self._layers = NormalizationLayers()
        self._margin = StabilityMargin()
        self._first_losses = _Mean()
        self._last_losses = _Mean()
        self._unseen = 0
        self._guessed = 0
        self._open_losses: dict[tuple[int, int], float] = {}

    def feed(self, block: Block) -> None:
        """Take one block."""
        self.ranks.add(block.rank)
        self._events(block)
        if not len(block):
            return
        scalars = block.scalars
        support = scalars["phase"] == SUPPORT
        self.inner_steps += int(support.sum())
        flags = scalars["flags"].astype(int)[support]
        self._unseen += int(((flags & FLAGS["incomplete"]) > 0).sum())
        self._guessed += int(((flags & FLAGS["uncertain"]) > 0).sum())
        self._watched.feed(block)
        rates = scalars["learning_rate"][support & np.isfinite(scalars["learning_rate"])]
        if len(rates):
            extremes = [*self._rates, float(rates.min()), float(rates.max())]
            self._rates = [min(extremes), max(extremes)]
        self._margin.feed(block, support)
        self._losses(block, support)
        self._norms.feed(block, support)
        self._layers.feed(block, support)

    def _events(self, block: Block) -> None:
        for event in block.events_of("task-start"):
            self.tasks += int(event.data.get("width", 1))
            self.adapters.setdefault(str(event.data.get("adapter", "")))
            if event.data.get("optimizer"):
                self.optimizers.setdefault(str(event.data["optimizer"]))
        self.outer_steps += len(block.events_of("outer-step"))
        for event in block.events_of("incomplete"):
            self.incomplete.setdefault(str(event.data["reason"]))

    def _losses(self, block: Block, support: Flags) -> None:
        """Take in first losses, and later ones in place of the same task's before."""
        losses, step, by_task = block.scalars["loss"], block.scalars["step"], block.by_task
        seen = support & (block.scalars["loss_seen"] > 0)
        later = seen & (step > 0)
        before = by_task.previous(later)
        replaced = np.where(before >= 0, losses[before], 0.0)
        known = before >= 0
        for row, task in zip(by_task.first(later).tolist(), by_task.tasks, strict=True):
            if row >= 0 and (block.rank, task) in self._open_losses:
                replaced[row], known[row] = self._open_losses[block.rank, task], True
        self._first_losses.add(losses[seen & (step == 0)])
        self._last_losses.replace(replaced[later], losses[later], int(known.sum()))
        for row, task in zip(by_task.last(later).tolist(), by_task.tasks, strict=True):
            if row >= 0 and task not in block.ended:
                self._open_losses[block.rank, task] = float(losses[row])
        for task in block.ended:
            self._open_losses.pop((block.rank, task), None)

    def summary(self, overhead: float = 0.0) -> Summary:
        """What was watched."""
        return Summary(
            tasks=self.tasks,
            inner_steps=self.inner_steps,
            outer_steps=self.outer_steps,
            layers=self._watched.count(),
            adapters=tuple(self.adapters),
            overhead_fraction=overhead,
            ranks=max(len(self.ranks), 1),
            optimizers=tuple(self.optimizers),
            learning_rates=(self._rates[0], self._rates[1]) if self._rates else None,
            incomplete=(*self.incomplete, *self._not_seen()),
        )

    def _not_seen(self) -> tuple[str, ...]:
        """What the rows themselves say was not, or not surely, seen."""
        sentences = []
        if self._unseen:
            sentences.append(
                f"The weights after {self._unseen} of {self.inner_steps} inner steps were not "
                "seen: a task ended earlier than those before it, or its update left torch."
            )
        if self._guessed:
            sentences.append(
                f"Which tensor was the updated weight had to be guessed in {self._guessed} of "
                f"{self.inner_steps} inner steps; name a step with probe.step() to be sure."
            )
        return tuple(sentences)

    def norms(self) -> tuple[NormTrace, ...]:
        """The task that grew most, parameter by parameter."""
        return self._norms.traces()

    def batch_norm(self) -> tuple[BatchNormRow, ...]:
        """Every normalisation layer, worst over the run."""
        return self._layers.rows()

    def health(self) -> Health:
        """How well it behaved."""
        first, last = self._first_losses.value(), self._last_losses.value()
        return Health(
            largest_growth=self._norms.growth if self._norms.layer else None,
            largest_growth_layer=self._norms.layer,
            instability_margin=None if math.isnan(self._margin.value) else self._margin.value,
            running_statistics_distance=self._layers.distance(),
            support_loss=(first, last) if first is not None and last is not None else None,
        )


class _Mean:
    """Of any number of values; the sum is the same however they are divided into blocks."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: Array) -> None:
        self._sum(values)
        self.count += len(values)

    def replace(self, old: Array, new: Array, replaced: int) -> None:
        """Each of ``new`` in place of its ``old``; 0 for those that replace none."""
        self._sum(np.stack([-old, new], axis=1).reshape(-1))
        self.count += len(new) - replaced

    def _sum(self, values: Array) -> None:
        with np.errstate(all="ignore"):
            self.total = float(np.add.accumulate(np.append(self.total, values))[-1])

    def value(self) -> float | None:
        return self.total / self.count if self.count else None
