"""Charts as plain geometry: positions in pixels that the HTML template draws as inline SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from divergence_probe.diagnosis.diagnosis import BatchNormRow, NormTrace
from divergence_probe.report import numbers
from divergence_probe.report.wording import one_line

_LABEL_PITCH = 16.0
_BROKEN_BAND = 32.0  # room above the plot for values that no scale holds


@dataclass(frozen=True)
class Tick:
    """A position along an axis, in pixels, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """One value: where it lies, what a reader hovering over it sees, whether it is nan or inf."""

    x: float
    y: float
    told: str
    broken: bool = False


@dataclass(frozen=True)
class Series:
    """One line: its name, its colour slot (0 is grey), its dots and where its label stands."""

    name: str
    slot: int
    dots: tuple[Dot, ...]
    label_y: float

    @property
    def path(self) -> str:
        """The finite dots as the points of an SVG polyline."""
        return _points([dot for dot in self.dots if not dot.broken])

    @property
    def leap(self) -> str:
        """The stretch from the last finite dot to the first nan or inf, or empty."""
        for before, after in itertools.pairwise(self.dots):
            if after.broken and not before.broken:
                return _points([before, after])
        return ""


def _points(dots: Sequence[Dot]) -> str:
    return " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in dots)


@dataclass(frozen=True)
class Chart:
    """A drawing area with its margins, axes and series, all in pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    broken: bool


def norm_chart(traces: Sequence[NormTrace], limit: int = 8) -> Chart | None:
    """Norms by inner step on a log scale; None where there is no positive finite norm to draw."""
    shown = [trace for trace in numbers.by_growth(traces)[:limit] if trace.norms]
    values = [norm for trace in shown for norm in trace.norms if math.isfinite(norm) and norm > 0]
    if not values:
        return None
    broken = any(not math.isfinite(norm) for trace in shown for norm in trace.norms)
    low, high = _decades(min(values), max(values))
    width, height, left, right, bottom = 860.0, 330.0, 58.0, 236.0, 42.0
    top = 14.0 + (_BROKEN_BAND if broken else 0)
    longest = max(len(trace.norms) for trace in shown)

    def x(index: int) -> float:
        return left + (width - left - right) * (index / (longest - 1) if longest > 1 else 0)

    def y(norm: float) -> float:
        if not math.isfinite(norm):
            return top - _BROKEN_BAND / 2
        share = (math.log10(norm) - low) / (high - low)
        return height - bottom - (height - bottom - top) * share

    drawn: list[tuple[NormTrace, tuple[Dot, ...]]] = []
    for trace in shown:
        dots = tuple(
            Dot(
                x(i),
                y(norm),
                f"{one_line(trace.layer)}, {step_name(i)}: {numbers.compact(norm)}",
                not math.isfinite(norm),
            )
            for i, norm in enumerate(trace.norms)
            if norm > 0 or not math.isfinite(norm)
        )
        drawn += [(trace, dots)] if dots else []
    series = _labelled(drawn, top - _BROKEN_BAND / 2 if broken else top, height - bottom)
    y_ticks = tuple(Tick(y(10.0**power), _power(power)) for power in _powers(low, high))
    x_ticks = tuple(Tick(x(i), step_name(i)) for i in _spaced(longest))
    return Chart(width, height, left, right, top, bottom, x_ticks, y_ticks, series, broken)


def step_name(index: int) -> str:
    """What an index into a trace's norms stands for."""
    return "before" if index == 0 else f"step {index - 1}"


def _labelled(
    drawn: list[tuple[NormTrace, tuple[Dot, ...]]], top: float, bottom: float
) -> tuple[Series, ...]:
    """Series with labels at the height of their last dot, pushed apart where they would touch."""
    order = sorted(range(len(drawn)), key=lambda i: (drawn[i][1][-1].y, i))
    at = [drawn[i][1][-1].y for i in order]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + _LABEL_PITCH)
    over = at[-1] - bottom if at else 0.0
    for i in reversed(range(len(at))):  # what ran past the bottom moves up again
        at[i] = max(top, min(at[i], bottom if over > 0 and i == len(at) - 1 else at[i]))
        if i + 1 < len(at):
            at[i] = min(at[i], at[i + 1] - _LABEL_PITCH)
    heights = dict(zip(order, at, strict=True))
    series, slot = [], 0
    for i, (trace, dots) in enumerate(drawn):
        slot += 1 if numbers.is_grave(trace.norms) else 0
        colour = slot if numbers.is_grave(trace.norms) else 0
        series.append(Series(_label(trace.layer), colour, dots, heights[i]))
    return tuple(series)


def _label(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= 30 else "…" + name[-29:]


def _decades(low: float, high: float) -> tuple[float, float]:
    """Whole powers of ten around ``low`` and ``high``, at least one apart."""
    floor, ceiling = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return float(floor), float(max(ceiling, floor + 1))


def _powers(low: float, high: float, most: int = 7) -> list[int]:
    step = max(1, math.ceil((high - low) / most))
    return list(range(int(low), int(high) + 1, step))


def _power(power: int) -> str:
    if 0 <= power <= 3:
        return str(10**power)
    return f"{10.0**power:g}" if -3 <= power < 0 else f"1e{power}"


def _spaced(longest: int, most: int = 9) -> list[int]:
    step = max(1, math.ceil((longest - 1) / (most - 1))) if longest > 1 else 1
    return list(range(0, longest, step))


@dataclass(frozen=True)
class Bar:
    """One layer's distance: its name, where its bar ends, the value in words, grade 0 to 2."""

    name: str
    y: float
    end: float
    told: str
    grade: int


@dataclass(frozen=True)
class DistanceChart:
    """Distances of running means on a log axis, in pixels."""

    width: float
    height: float
    left: float
    right: float
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    edge: float


def distance_chart(rows: Sequence[BatchNormRow], limit: int = 12) -> DistanceChart | None:
    """How far each layer's running mean lies from the batch's, in batch standard deviations.

    None where it was measured for no layer.
    """
    shown = [row for row in numbers.by_distance(rows) if not math.isnan(row.mean_distance)][:limit]
    if not shown:
        return None
    finite = [
        row.mean_distance
        for row in shown
        if math.isfinite(row.mean_distance) and row.mean_distance > 0
    ]
    low, high = _decades(min([*finite, 0.05]), max([*finite, numbers.GRAVE_DISTANCE * 1.5]))
    low = max(low, -4.0)
    width, left, right, pitch = 860.0, 236.0, 70.0, 22.0
    height = pitch * len(shown) + 34

    def x(distance: float) -> float:
        power = math.log10(distance) if distance > 0 else low
        return left + (width - left - right) * (min(max(power, low), high) - low) / (high - low)

    bars = tuple(
        Bar(
            _label(row.layer),
            10 + pitch * (i + 0.5),
            x(row.mean_distance),
            f"{numbers.brief(row.mean_distance)} σ",
            2
            if row.mean_distance >= numbers.GRAVE_DISTANCE
            else int(row.mean_distance >= numbers.DOUBTFUL_DISTANCE),
        )
        for i, row in enumerate(shown)
    )
    ticks = tuple(Tick(x(10.0**power), _power(power)) for power in _powers(low, high))
    return DistanceChart(width, height, left, right, bars, ticks, x(numbers.GRAVE_DISTANCE))
