"""The numbers behind a report, gathered block by block: what was watched and how it behaved."""

from __future__ import annotations

import math

import numpy as np

from divergence_probe.diagnosis.diagnosis import BatchNormRow, Health, NormTrace, Summary
from divergence_probe.record.schema import (
    FLAGS,
    MISSING,
    PHASES,
    SUPPORT,
    Array,
    Block,
    Event,
    Flags,
)

_STEPS_SHOWN = 64
SMALL = 0.03
#: From so many turns of a layer between two modes on it is said to change all the time.
_TURNS = 3


class Collector:
    """Small running state over any number of blocks.

    Keeps the norms of one task only: the one whose parameters grew most.
    """

    def __init__(self) -> None:
        self.tasks = 0
        self.inner_steps = 0
        self.outer_steps = 0
        self.ranks: set[int] = set()
        self.layers: set[str] = set()
        self.adapters: dict[str, None] = {}
        self.optimizers: dict[str, None] = {}
        self.incomplete: dict[str, None] = {}
        self._rates: list[float] = []
        self._norms = _WorstTask()
        self._batch_norm: dict[str, _Layer] = {}
        self._instability = math.nan
        self._first_losses = _Mean()
        self._last_losses = _Mean()
        self._unseen = 0
        self._guessed = 0
        self._open_losses: dict[tuple[int, int], float] = {}

    def feed(self, block: Block) -> None:
        """Take one block."""
        self.ranks.add(block.rank)
        for event in block.events:
            self._event(block.rank, event)
        if not len(block):
            return
        scalars = block.scalars
        support = scalars["phase"] == SUPPORT
        self.inner_steps += int(support.sum())
        flags = scalars["flags"].astype(int)[support]
        self._unseen += int(((flags & FLAGS["incomplete"]) > 0).sum())
        self._guessed += int(((flags & FLAGS["uncertain"]) > 0).sum())
        for info in block.layout.parameters:
            self.layers.add(info.name.rpartition(".")[0] or info.name)
        rates = scalars["learning_rate"][support & np.isfinite(scalars["learning_rate"])]
        if len(rates):
            extremes = [*self._rates, float(rates.min()), float(rates.max())]
            self._rates = [min(extremes), max(extremes)]
        finite = scalars["instability"][np.isfinite(scalars["instability"])]
        if len(finite):
            self._instability = float(np.fmax(self._instability, finite.max()))
        self._losses(block, support)
        self._norms.feed(block, support)
        self._statistics(block)

    def _event(self, rank: int, event: Event) -> None:
        data = event.data
        if event.kind == "task-start":
            self.tasks += int(data.get("width", 1))
            self.adapters.setdefault(str(data.get("adapter", "")))
            if data.get("optimizer"):
                self.optimizers.setdefault(str(data["optimizer"]))
        elif event.kind == "outer-step":
            self.outer_steps += 1
        elif event.kind == "incomplete":
            self.incomplete.setdefault(str(data["reason"]))

    def _losses(self, block: Block, support: Flags) -> None:
        seen = support & (block.scalars["loss_seen"] > 0)
        for row in np.flatnonzero(seen):
            loss = float(block.scalars["loss"][row])
            key = (block.rank, int(block.scalars["task"][row]))
            if block.scalars["step"][row] == 0:
                self._first_losses.add(loss)
            elif key in self._open_losses:
                self._last_losses.remove(self._open_losses[key])
            if block.scalars["step"][row] > 0:
                self._last_losses.add(loss)
                self._open_losses[key] = loss
        for event in block.events:
            if event.kind == "task-end":
                self._open_losses.pop((block.rank, event.task), None)

    def _statistics(self, block: Block) -> None:
        columns = block.batch_norm
        called = columns["bn_calls"] > 0
        for layer in np.flatnonzero(called.any(0)):
            name = block.layout.batch_norms[layer]
            summary = self._batch_norm.setdefault(name, _Layer())
            values = {k: v[:, layer] for k, v in columns.items()}
            summary.feed(values, block.scalars["phase"], block.scalars["step"])

    def summary(self, overhead: float = 0.0) -> Summary:
        """What was watched."""
        return Summary(
            tasks=self.tasks,
            inner_steps=self.inner_steps,
            outer_steps=self.outer_steps,
            layers=len(self.layers),
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
        return tuple(layer.row(name) for name, layer in self._batch_norm.items())

    def health(self) -> Health:
        """How well it behaved."""
        distances = [
            layer.distance
            for layer in self._batch_norm.values()
            if any("eval" in mode for mode in layer.modes.values())
            and not math.isnan(layer.distance)
        ]
        first, last = self._first_losses.value(), self._last_losses.value()
        return Health(
            largest_growth=self._norms.growth if self._norms.layer else None,
            largest_growth_layer=self._norms.layer,
            instability_margin=None if math.isnan(self._instability) else self._instability,
            running_statistics_distance=max(distances) if distances else None,
            support_loss=(first, last) if first is not None and last is not None else None,
        )


class _Mean:
    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    def remove(self, value: float) -> None:
        self.total -= value
        self.count -= 1

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class _WorstTask:
    """Norms by step of the task with the largest growth; of the others only that number."""

    def __init__(self) -> None:
        self.growth = 0.0
        self.layer: str | None = None
        self._task: tuple[int, int] | None = None
        self._norms: list[Array] = []
        self._names: tuple[str, ...] = ()
        self._current: dict[tuple[int, int], list[Array]] = {}

    def feed(self, block: Block, support: Flags) -> None:
        tasks = block.scalars["task"]
        before, after = block.parameters["norm_before"], block.parameters["norm_after"]
        for index in np.unique(tasks[support]):
            key = (block.rank, int(index))
            rows = np.flatnonzero((tasks == index) & support)
            norms = self._current.setdefault(key, [before[rows[0]]])
            if len(norms) <= _STEPS_SHOWN:
                norms.extend(after[rows])
            else:
                norms[-1] = after[rows[-1]]
            self._compare(key, block, norms)
        for event in block.events:
            if event.kind == "task-end":
                self._current.pop((block.rank, event.task), None)
        while len(self._current) > 16:  # tasks that never said they ended
            self._current.pop(next(iter(self._current)))

    def _compare(self, key: tuple[int, int], block: Block, norms: list[Array]) -> None:
        start, end = norms[0], norms[-1]
        whole = np.sqrt(np.sum(np.where(start == MISSING, 0, start) ** 2))
        with np.errstate(all="ignore"):
            growth = end / np.fmax(start, 1e-12)
        # Small parameters (biases, zero-initialised heads) have no scale of their own to grow from.
        small = (start < SMALL * whole) | (start <= 0)
        unmeasured = (small & np.isfinite(end)) | (start == MISSING) | (end == MISSING)
        growth = np.where(unmeasured, -1.0, np.where(np.isnan(growth), np.inf, growth))
        if not len(growth):
            return
        worst = int(np.argmax(growth))
        if growth[worst] > self.growth or self._task is None or self._task == key:
            measured = growth[worst] >= 0
            self.growth = float(growth[worst]) if measured else 0.0
            self.layer = block.layout.parameters[worst].name if measured else None
            self._task = key
            self._norms = norms
            self._names = tuple(info.name for info in block.layout.parameters)

    def traces(self) -> tuple[NormTrace, ...]:
        if self._task is None:
            return ()
        table = np.stack(self._norms)
        table = np.where(table == MISSING, np.nan, table)
        return tuple(
            NormTrace(
                name, self._task[1], tuple(float(x) for x in table[:, i]), _first(table[:, i])
            )
            for i, name in enumerate(self._names)
            if not np.isnan(table[:1, i]).all()
        )


def _first(norms: Array) -> int | None:
    with np.errstate(all="ignore"):
        over = (norms[1:] >= 2 * norms[:-1]) & (norms[:-1] > 0) | ~np.isfinite(norms[1:])
    hits = np.flatnonzero(over)
    return int(hits[0]) if len(hits) else None


class _Layer:
    """One normalisation layer over the run; the worst of what matters."""

    def __init__(self) -> None:
        self._turns: dict[str, list[str]] = {}
        self.batches: int | None = None
        self.distance = math.nan
        self.log_ratio = math.nan
        self.values: int | None = None

    def feed(self, columns: dict[str, Array], phases: Array, steps: Array) -> None:
        """Take one block's rows of this layer."""
        called = columns["bn_calls"] > 0
        for number, phase in enumerate(PHASES):
            modes = columns["bn_training"][called & (phases == number)]
            turns = self._turns.setdefault(phase, []) if len(modes) else []
            for mode in modes[np.flatnonzero(np.diff(modes, prepend=np.nan))][:_TURNS]:
                word = {0.0: "eval", 1.0: "train"}.get(float(mode), "both")
                if len(turns) < _TURNS and turns[-1:] != [word]:
                    turns.append(word)
        # A task's first step: later the weights have moved, and its copy's counter with them.
        first = called & (phases == SUPPORT) & (steps == 0)
        evaluated = first & (columns["bn_training"] == 0)
        rows = evaluated if evaluated.any() else first
        counted = rows & (columns["bn_batches"] >= 0)
        if counted.any():
            row = int(np.flatnonzero(counted)[-1])
            own = columns["bn_calls"][row] if columns["bn_training"][row] > 0 else 0
            self.batches = max(int(columns["bn_batches"][row] - own), 0)
        values = columns["bn_values"][called & (columns["bn_values"] > 0)]
        if len(values):
            self.values = int(min(values.min(), self.values or values.min()))
        self._worst(columns["bn_mean_distance"][rows], columns["bn_log_variance_ratio"][rows])

    @property
    def modes(self) -> dict[str, str]:
        """By phase: ``train``, ``eval``, ``train→eval`` (one after the other) or ``train+eval``."""
        return {
            phase: "→".join(turns) if len(turns) < _TURNS and "both" not in turns else "train+eval"
            for phase, turns in self._turns.items()
        }

    def _worst(self, distances: Array, ratios: Array) -> None:
        if np.isfinite(distances).any():
            self.distance = float(np.fmax(self.distance, np.nanmax(distances)))
        finite = ratios[np.isfinite(ratios)]
        if len(finite):
            worst = float(finite[np.argmax(np.abs(finite))])
            if math.isnan(self.log_ratio) or abs(worst) > abs(self.log_ratio):
                self.log_ratio = worst

    def row(self, name: str) -> BatchNormRow:
        return BatchNormRow(
            layer=name,
            modes=self.modes,
            batches_seen=self.batches,
            mean_distance=self.distance,
            variance_ratio=math.exp(self.log_ratio) if not math.isnan(self.log_ratio) else math.nan,
            base_buffers="own",
            values_per_channel=self.values,
        )
