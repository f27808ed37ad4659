"""Normalisation layers over a run: the modes they ran in, and the worst of their statistics."""

from __future__ import annotations

import math

import numpy as np

from divergence_probe.diagnosis.diagnosis import BatchNormRow
from divergence_probe.record.schema import PHASES, Block, Flags

#: From so many turns of a layer between two modes on it is said to change all the time.
_TURNS = 3


class NormalizationLayers:
    """Small running state of every layer that was called."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def feed(self, block: Block, support: Flags) -> None:
        """Take one block; ``support`` (``[S]``) are its inner steps."""
        called = block.batch_norm["bn_calls"] > 0
        if not called.any():
            return
        layers = {
            column: self._layers.setdefault(block.layout.batch_norms[column], _Layer())
            for column in np.flatnonzero(called.any(0)).tolist()
        }
        # A task's first step: later the weights have moved, and its copy's counter with them.
        first = called & (support & (block.scalars["step"] == 0))[:, None]
        evaluated = first & (block.batch_norm["bn_training"] == 0)
        rows = np.where(evaluated.any(0), evaluated, first)
        _modes(block, called, layers)
        _values(block, called, layers)
        _counts(block, rows, layers)
        _distances(block, rows, layers)

    def rows(self) -> tuple[BatchNormRow, ...]:
        """Every layer, worst over the run."""
        return tuple(layer.row(name) for name, layer in self._layers.items())

    def distance(self) -> float | None:
        """The largest distance of statistics that were used, in eval mode."""
        distances = [
            layer.distance
            for layer in self._layers.values()
            if any("eval" in mode for mode in layer.modes.values())
            and not math.isnan(layer.distance)
        ]
        return max(distances) if distances else None


class _Layer:
    """One normalisation layer over the run; the worst of what matters."""

    def __init__(self) -> None:
        self._turns: dict[str, list[str]] = {}
        self.batches: int | None = None
        self.distance = math.nan
        self.log_ratio = math.nan
        self.values: int | None = None

    def runs(self, phase: str, modes: list[float]) -> None:
        """Take the modes it ran in one after the other."""
        turns = self._turns.setdefault(phase, [])
        for mode in modes[:_TURNS]:
            word = {0.0: "eval", 1.0: "train"}.get(mode, "both")
            if len(turns) < _TURNS and turns[-1:] != [word]:
                turns.append(word)

    @property
    def modes(self) -> dict[str, str]:
        """By phase: ``train``, ``eval``, ``train→eval`` (one after the other) or ``train+eval``."""
        return {
            phase: "→".join(turns) if len(turns) < _TURNS and "both" not in turns else "train+eval"
            for phase, turns in self._turns.items()
        }

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


_Layers = dict[int, _Layer]


def _modes(block: Block, called: Flags, layers: _Layers) -> None:
    for number, phase in enumerate(PHASES):
        rows = np.flatnonzero(block.scalars["phase"] == number)
        ran = called[rows]
        if not ran.any():
            continue
        modes = block.batch_norm["bn_training"][rows]
        lowest = np.where(ran, modes, np.inf).min(0)
        highest = np.where(ran, modes, -np.inf).max(0)
        for column in np.flatnonzero(ran.any(0)).tolist():
            if lowest[column] == highest[column]:
                layers[column].runs(phase, [float(lowest[column])])
            else:
                turns = modes[ran[:, column], column]
                changes = np.flatnonzero(np.diff(turns, prepend=np.nan))
                layers[column].runs(phase, turns[changes].tolist())


def _values(block: Block, called: Flags, layers: _Layers) -> None:
    """The fewest values a channel was normalised over."""
    values = block.batch_norm["bn_values"]
    fewest = np.where(called & (values > 0), values, np.inf).min(0).tolist()
    for column, layer in layers.items():
        if math.isfinite(fewest[column]):
            layer.values = int(min(fewest[column], layer.values or fewest[column]))


def _counts(block: Block, rows: Flags, layers: _Layers) -> None:
    """Batches seen before the latest of ``rows`` (``[S, B]``)."""
    batches = block.batch_norm["bn_batches"]
    counted = rows & (batches >= 0)
    latest = len(rows) - 1 - counted[::-1].argmax(0)
    for column in np.flatnonzero(counted.any(0)).tolist():
        row = int(latest[column])
        trained = block.batch_norm["bn_training"][row, column] > 0
        own = block.batch_norm["bn_calls"][row, column] if trained else 0
        layers[column].batches = max(int(batches[row, column] - own), 0)


def _distances(block: Block, rows: Flags, layers: _Layers) -> None:
    """How far the running statistics were off in ``rows`` (``[S, B]``)."""
    distances = np.where(rows, block.batch_norm["bn_mean_distance"], np.nan)
    largest = np.fmax.reduce(distances, axis=0)
    for column in np.flatnonzero(np.isfinite(distances).any(0)).tolist():
        layers[column].distance = float(np.fmax(layers[column].distance, largest[column]))
    ratios = np.where(rows, block.batch_norm["bn_log_variance_ratio"], np.nan)
    sizes = np.where(np.isfinite(ratios), np.abs(ratios), -1.0)
    worst = sizes.argmax(0)
    for column in np.flatnonzero(np.isfinite(ratios).any(0)).tolist():
        ratio, layer = float(ratios[worst[column], column]), layers[column]
        if math.isnan(layer.log_ratio) or abs(ratio) > abs(layer.log_ratio):
            layer.log_ratio = ratio
