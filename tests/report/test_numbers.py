"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from divergence_probe.diagnosis.diagnosis import BatchNormRow, NormTrace
from divergence_probe.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9.5937, "9.5937"), (14.2, "14.200"), (999.999, "1000.00"), (9999.4, "9999.4"),
        (1.7e5, "1.7e5"), (5.4257e13, "5.4e13"), (0.0031, "0.0031"), (3.1e-4, "3.1e-4"),
        (0.0, "0"), (-0.0, "0"), (-2.5, "-2.5000"), (None, "–"), (math.nan, "nan"),
        (math.inf, "inf"), (-math.inf, "-inf"), (5e-324, "4.9e-324"), (1e308, "1.0e308"),
    ],
)  # fmt: skip
def test_compact(value: float | None, text: str) -> None:
    assert numbers.compact(value) == text


@pytest.mark.parametrize(
    ("norms", "text"),
    [
        ((1.0, 1.04), "×1.04"), ((1.0, 42.7), "×42.7"), ((1.0, 5.7e12), "×5.7e12"),
        ((1.0, 0.012), "×0.012"), ((1.0, 0.0), "×0"), ((0.0, 3.0), "from 0"),
        ((0.0, 0.0), "×1.00"), ((1.0, math.inf, math.nan), "nan"), ((1.0, math.inf), "inf"),
        ((1.0,), ""), ((), ""),
    ],
)  # fmt: skip
def test_growth_words(norms: tuple[float, ...], text: str) -> None:
    assert numbers.growth_words(norms) == text


def test_sparkline_is_flat_for_a_layer_that_stays_put() -> None:
    calm, wild = (1.0, 1.01, 1.0), (1.0, 1e4, 1e8)
    span = numbers.log_span([calm, wild])
    assert numbers.sparkline(calm, span) == "▁▁▁"
    assert numbers.sparkline(wild, span) == "▁▅█"


def test_sparkline_never_loses_a_spike() -> None:
    norms = [1.0] * 1000
    norms[137] = math.nan
    line = numbers.sparkline(norms, (0.0, 1.0), width=10)
    assert len(line) == 10
    assert "×" in line


def test_growth_ranks_broken_first_then_largest_then_from_zero_by_its_first_move() -> None:
    traces = [
        NormTrace("calm", 0, (1.0, 1.0)),
        NormTrace("zero", 0, (0.0, 1.0, 50.0)),
        NormTrace("late", 0, (1.0, 1.0, math.nan)),
        NormTrace("early", 0, (1.0, math.inf, math.inf)),
        NormTrace("large", 0, (1.0, 99.0)),
    ]
    order = [trace.layer for trace in numbers.by_growth(traces)]
    assert order == ["early", "late", "large", "zero", "calm"]


def test_telling_steps_hold_each_step_once_with_the_ends_first() -> None:
    for longest in range(40):
        trace = NormTrace("w", 0, (1.0,) * longest, first_to_grow=5)
        steps = numbers.telling_steps([trace])
        assert sorted(steps) == list(range(longest))
        assert not longest or steps[0] == 0


def bn(support: str, query: str | None = None) -> BatchNormRow:
    modes = {"support": support} | ({"query": query} if query else {})
    return BatchNormRow("norm", modes, 0, 1.0, 1.0, "own")


@pytest.mark.parametrize(
    ("row", "words", "notes"),
    [
        (bn("eval"), "eval", []),
        (bn("train", "train"), "train", []),
        (
            bn("train→eval", "train→eval"),
            "train→eval",
            ["train→eval: train mode in earlier tasks, eval mode in later ones"],
        ),
        (bn("train+eval"), "train+eval", ["train+eval: now in one mode, now in the other"]),
        (bn("train", "eval"), "train/eval", ["…/…: support, then query"]),
    ],
)
def test_modes_in_words(row: BatchNormRow, words: str, notes: list[str]) -> None:
    assert numbers.mode_words(row) == words
    assert numbers.mode_notes([row, row]) == notes
