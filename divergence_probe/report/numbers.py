"""Numbers as people read them: compact norms, growth, sparklines, and which rows come first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from divergence_probe.diagnosis.diagnosis import BatchNormRow, NormTrace

BLOCKS = "▁▂▃▄▅▆▇█"
#: Growth of a norm from which on it is shown as grave.
GRAVE_GROWTH = 10.0
#: Distance of a running mean, in batch standard deviations, shown as doubtful and as grave.
DOUBTFUL_DISTANCE, GRAVE_DISTANCE = 0.5, 2.0


def compact(value: float | None) -> str:
    """A number in at most eight characters: ``9.5937``, ``14.200``, ``1.7e5``, ``nan``."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if size == 0:
        return "0"
    if 1 <= size < 9999.5:
        decimals = 4 - int(math.log10(size))
        return f"{value:.{decimals}f}"
    if 1e-3 <= size < 1:
        return f"{value:.4f}"
    return _scientific(value)


def brief(value: float | None) -> str:
    """A number with three telling digits: ``0.12``, ``18.4``, ``1.61``, ``1.7e5``."""
    if value is None or not math.isfinite(value) or not 1e-3 <= abs(value) < 1e4:
        return compact(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def growth(norms: Sequence[float]) -> float:
    """Last norm over the first, dimensionless.

    inf where any norm is not finite, nan where it cannot be told: fewer than two norms, or a
    first norm of 0.
    """
    if any(not math.isfinite(norm) for norm in norms):
        return math.inf
    if len(norms) < 2 or norms[0] == 0:
        return math.nan
    return norms[-1] / norms[0]


def growth_words(norms: Sequence[float]) -> str:
    """Growth as ``×1.04``, ``nan`` or ``inf`` where it ended so, ``from 0``, or empty."""
    bad = [norm for norm in norms if not math.isfinite(norm)]
    if bad:
        return compact(bad[-1])
    if len(norms) < 2:
        return ""
    if norms[0] == 0:
        return "from 0" if norms[-1] else "×1.00"
    return times(norms[-1] / norms[0])


def times(factor: float) -> str:
    """A factor with its sign: ``×1.04``, ``×42.7``, ``×5.7e12``."""
    if not math.isfinite(factor):
        return compact(factor)
    if factor == 0:
        return "×0"
    if 0.1 <= abs(factor) < 10:
        return f"×{factor:.2f}"
    if 1e-3 <= abs(factor) < 0.1:
        return f"×{factor:.2g}"
    if 10 <= abs(factor) < 1000:
        return f"×{factor:.3g}"
    return f"×{_scientific(factor)}"


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def is_grave(norms: Sequence[float]) -> bool:
    """Whether a trace grew by :data:`GRAVE_GROWTH` or more, or stopped being finite."""
    return growth(norms) >= GRAVE_GROWTH


def by_growth(traces: Sequence[NormTrace]) -> list[NormTrace]:
    """The traces, largest growth first; those that stopped being finite lead, earliest first."""

    def key(trace: NormTrace) -> tuple[float, float]:
        # A zero-initialised head is ranked by its growth from its first move on.
        start = next((i for i, norm in enumerate(trace.norms) if norm), 0)
        factor = growth(trace.norms[start:])
        first_bad = next(
            (i for i, norm in enumerate(trace.norms) if not math.isfinite(norm)), len(trace.norms)
        )
        return (0.0 if math.isnan(factor) else -factor), float(first_bad)

    return sorted(traces, key=key)


def first_to_grow(traces: Sequence[NormTrace]) -> NormTrace | None:
    """The trace that passed the growth bound at the earliest step, in model order."""
    grown = [trace for trace in traces if trace.first_to_grow is not None]
    return min(grown, key=lambda trace: trace.first_to_grow or 0, default=None)


def telling_steps(traces: Sequence[NormTrace]) -> list[int]:
    """Indices into the norms: before, after, where growth starts, then evenly spread."""
    longest = max((len(trace.norms) for trace in traces), default=0)
    grown = first_to_grow(traces)
    order = [0, longest - 1] + ([(grown.first_to_grow or 0) + 1] if grown is not None else [])
    gap = longest
    while gap > 1:
        gap = math.ceil(gap / 2)
        order += range(gap, longest, gap)
    return [index for index in dict.fromkeys(order) if 0 <= index < longest]


def by_distance(rows: Sequence[BatchNormRow]) -> list[BatchNormRow]:
    """BatchNorm rows, statistics farthest from the batch's own first; unmeasured ones last."""
    return sorted(rows, key=lambda row: -_remoteness(row))


def _remoteness(row: BatchNormRow) -> float:
    distance = -1.0 if math.isnan(row.mean_distance) else row.mean_distance
    if row.variance_ratio > 0:
        # A factor of e in the variance weighs as much as one standard deviation in the mean.
        distance += abs(math.log(row.variance_ratio))
    return distance


def mode_words(row: BatchNormRow) -> str:
    """A layer's modes: ``eval`` throughout, or ``train/eval`` in the order of the phases."""
    modes = list(dict.fromkeys(row.modes.values()))
    return modes[0] if len(modes) == 1 else "/".join(row.modes.values())


def mode_notes(rows: Sequence[BatchNormRow]) -> list[str]:
    """What the modes of these rows mean, where they are more than one word; a line each."""
    words = list(dict.fromkeys(mode for row in rows for mode in row.modes.values()))
    notes = [
        f"{word}: {first} mode in earlier tasks, {then} mode in later ones"
        for word in words
        for first, arrow, then in [word.partition("→")]
        if arrow
    ]
    notes += [f"{word}: now in one mode, now in the other" for word in words if "+" in word]
    pairs = [tuple(row.modes) for row in rows if "/" in mode_words(row)]
    notes += [f"…/…: {', then '.join(phases)}" for phases in dict.fromkeys(pairs)]
    return notes


def log_span(traces: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Smallest and largest log10 of norm over first norm in all traces; at least one decade apart.

    One span for all rows keeps a layer that stays put flat beside one that explodes.
    """
    ratios = [_log_ratio(norms, norm) for norms in traces for norm in norms]
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    return low, max(high, low + 1.0)


def sparkline(norms: Sequence[float], span: tuple[float, float], width: int = 12) -> str:
    """The norms as blocks on a log scale over ``span``; ``×`` for nan, a full block for inf.

    More norms than ``width`` are drawn as the worst of each stretch, so that a spike is never lost.
    """
    heights = [_log_ratio(norms, norm) for norm in norms]
    if len(heights) > width:
        bounds = [round(i * len(heights) / width) for i in range(width + 1)]
        heights = [_worst(heights[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return "".join(_block(height, span) for height in heights)


def _log_ratio(norms: Sequence[float], norm: float) -> float:
    base = next((first for first in norms if math.isfinite(first) and first > 0), 1.0)
    if not math.isfinite(norm):
        return norm
    return math.log10(norm / base) if norm > 0 else -math.inf


def _worst(heights: Sequence[float]) -> float:
    return math.nan if any(math.isnan(height) for height in heights) else max(heights)


def _block(height: float, span: tuple[float, float]) -> str:
    if math.isnan(height):
        return "×"
    low, high = span
    share = (min(max(height, low), high) - low) / (high - low)
    return BLOCKS[round(share * (len(BLOCKS) - 1))]
