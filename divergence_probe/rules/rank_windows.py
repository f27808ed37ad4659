"""What one of several ranks did between two of its outer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from divergence_probe.record.schema import QUERY, SUPPORT, Array
from divergence_probe.rules.base import Frame, missing_to_nan

#: Inner learning rates this close (relative) are one: measured ones carry rounding.
SAME_RATE = 1e-3
PHASES = {SUPPORT: "support", QUERY: "query"}
#: What a layer ran in; 3 is both.
EVAL, TRAIN = 1, 2
#: Tasks of a window that are looked at: their settings are those of all the others.
_TASKS = 64

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Statistics:
    """A layer's running statistics as a window's first task finds them in the base.

    Attributes:
        norm: of the running mean.
        used: whether the layer normalises with them (eval mode).
        untrained: whether they are still exactly mean 0, variance 1.
    """

    norm: float
    used: bool
    untrained: bool


@dataclass
class Window:
    """What one rank did between two of its outer steps.

    Attributes:
        rates: inner learning rate by inner step.
        rates_vary: whether tasks had different ones.
        lengths: inner steps taken, by task.
        modes: :data:`EVAL`, :data:`TRAIN` or both, by (phase, layer).
        spoken: names of those layers for a sentence.
        statistics: of the base, by layer.
        start: ``[P]`` norms of the weights its first task started from.
        names: of those.
        site: the user's line of its first inner step.
    """

    rates: dict[int, float] = field(default_factory=dict)
    rates_vary: bool = False
    lengths: dict[int, int] = field(default_factory=dict)
    modes: dict[tuple[int, str], int] = field(default_factory=dict)
    spoken: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    start: Array | None = None
    names: tuple[str, ...] = ()
    site: str | None = None

    def note(self, frame: Frame, rows: Rows) -> None:
        """Add ``rows``, none of them an outer step."""
        support = rows[frame.support[rows]]
        if len(support) and len(self.lengths) < _TASKS:
            tasks, counts = np.unique(frame.task[support], return_counts=True)
            for task, count in zip(tasks.tolist(), counts.tolist(), strict=True):
                self.lengths[int(task)] = self.lengths.get(int(task), 0) + count
            self.site = self.site or frame.block.site(int(support[0]))
            self._note_rates(frame, support)
            first = support[frame.step[support] == 0]
            if len(first) and self.start is None:
                self.start = missing_to_nan(frame.block.parameters["norm_before"][first[0]])
                self.names = names_of(frame)
                self._note_statistics(frame, int(first[0]))
        layout = frame.block.layout
        self._note_modes(frame, rows, layout.batch_norms, frame.block.batch_norm["bn_training"])
        self._note_modes(frame, rows, layout.dropouts, frame.block.dropout)

    def _note_rates(self, frame: Frame, rows: Rows) -> None:
        rates = frame.block.scalars["learning_rate"][rows]
        unknown = ~np.isfinite(rates)
        if unknown.any():
            rates = np.where(unknown, _measured_rates(frame.block.parameters, rows), rates)
        for step, rate in zip(frame.step[rows].tolist(), rates.tolist(), strict=True):
            if np.isfinite(rate) and not same_rate(self.rates.setdefault(int(step), rate), rate):
                self.rates_vary = True

    def _note_statistics(self, frame: Frame, row: int) -> None:
        norm = frame.block.batch_norm
        for column in map(int, np.flatnonzero(norm["bn_running_mean_before"][row] >= 0)):
            self.statistics[frame.normalization(column)] = Statistics(
                float(norm["bn_running_mean_before"][row, column]),
                bool(norm["bn_training"][row, column] == 0),
                bool(norm["bn_untrained"][row, column] == 1),
            )

    def _note_modes(self, frame: Frame, rows: Rows, layers: list[str], table: Array) -> None:
        """Add what layers ran in: columns of 0 (eval), 1 (train) and 2 (both in one row)."""
        if not table.size:
            return
        phases = frame.block.scalars["phase"][rows]
        for phase in PHASES:
            ran = table[rows[phases == phase]]
            evaluated = ((ran == 0) | (ran == 2)).any(0)
            trained = ((ran == 1) | (ran == 2)).any(0)
            for column in map(int, np.flatnonzero(evaluated | trained)):
                mode = EVAL * int(evaluated[column]) | TRAIN * int(trained[column])
                key = (phase, layers[column])
                self.modes[key] = self.modes.get(key, 0) | mode
                self.spoken[key[1]] = frame.called(key[1:])


@dataclass
class State:
    """One rank at one outer step.

    Attributes:
        names: of the base's parameters.
        weights: ``[P]`` their norms when the step began.
        gradient: ``[P]`` norms of the gradients it applied; None where it is no step.
        site: the user's line, or None.
        window: what led there.
    """

    names: tuple[str, ...]
    weights: Array
    gradient: Array | None
    site: str | None
    window: Window


def names_of(frame: Frame) -> tuple[str, ...]:
    """Names of the parameters of a frame's rows."""
    return tuple(info.name for info in frame.block.layout.parameters)


def same_rate(one: float, other: float) -> bool:
    """Whether two learning rates are one."""
    return abs(one - other) <= SAME_RATE * max(abs(one), abs(other))


def _measured_rates(parameters: Mapping[str, Array], rows: Rows) -> Array:
    """``[S]`` the rate of plain descent where every parameter moved by it, else nan."""
    rates, gradients = parameters["step_rate"][rows], parameters["gradient_norm"][rows]
    # Of a gradient that is little more than rounding (a bias before BatchNorm) it says nothing.
    moved = np.isfinite(rates) & (gradients > 1e-3 * gradients.max(1, keepdims=True, initial=0.0))
    low = np.where(moved, rates, np.inf).min(1, initial=np.inf)
    high = np.where(moved, rates, -np.inf).max(1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        plain = high - low <= SAME_RATE * np.abs(high)
    return np.where(plain & np.isfinite(high), high, np.nan)
