"""The numbers behind a report, from hand-made blocks."""

from __future__ import annotations

import pytest

from divergence_probe.diagnosis.collector import Collector
from divergence_probe.record.schema import MISSING
from tests.rules.blocks import Row, evaluated, inner, make, query, train


def collected(*rows: Row, parameters: tuple[str, ...] = ("w", "b", "head")) -> Collector:
    collector = Collector()
    for row in rows:  # a block each
        collector.feed(make(row, batch_norms=["norm"], parameters=parameters))
    return collector


@pytest.mark.parametrize(
    ("modes", "word"),
    [
        ("ttt", "train"),
        ("eee", "eval"),
        ("tte", "train→eval"),
        ("ett", "eval→train"),
        ("tet", "train+eval"),
        ("b", "train+eval"),
    ],
)
def test_modes_of_a_layer_in_their_order(modes: str, word: str) -> None:
    columns = {"t": train(), "e": evaluated(), "b": train(bn_training=2)}
    rows = [inner(task, **columns[mode]) for task, mode in enumerate(modes)]

    (row,) = collected(*rows, query(9, **train())).batch_norm()

    assert row.modes == {"support": word, "query": "train"}


def test_statistics_used_in_some_tasks_only_are_measured() -> None:
    rows = [inner(0, **train()), inner(1, **evaluated(bn_mean_distance=0.7))]

    assert collected(*rows).health().running_statistics_distance == 0.7
    assert collected(rows[0]).health().running_statistics_distance is None


@pytest.mark.parametrize("after", [0.0, 3.0])
def test_a_task_that_begins_at_zero_has_no_growth(after: float) -> None:
    health = collected(inner(norm_before=0.0, norm_after=after)).health()

    assert (health.largest_growth, health.largest_growth_layer) == (None, None)


def test_growth_is_of_the_weights_that_have_a_size() -> None:
    health = collected(inner(norm_before=[10, 0, 0.1], norm_after=[11, 5, 9])).health()

    assert (health.largest_growth, health.largest_growth_layer) == (pytest.approx(1.1), "w")


@pytest.mark.parametrize(
    ("loss", "gradient", "margin"),
    [(2.0, 3.0, 5.0), (0.5, 3.0, 0.4), (2.0, 0.5, 0.4)],
)
def test_a_step_is_beyond_the_edge_where_something_grew(
    loss: float, gradient: float, margin: float
) -> None:
    """Momentum that is turned round near the bottom has a large quotient, and no consequence."""
    collector = Collector()
    steps = [
        inner(step=0, loss=1.0, gradient_norm=1.0, instability=0.4),
        inner(step=1, loss=loss, gradient_norm=gradient, instability=5.0),
    ]
    collector.feed(make(*steps))

    assert collector.health().instability_margin == margin


def test_a_last_step_that_was_not_seen_is_neither_growth_nor_a_norm() -> None:
    collector = Collector()
    steps = [
        inner(step=0, norm_before=1.0, norm_after=1.5),
        inner(step=1, norm_before=1.5, norm_after=MISSING),
    ]
    collector.feed(make(*steps))

    assert collector.health().largest_growth == pytest.approx(1.5)
    assert collector.norms()[0].norms == (1.0, 1.5)
    assert collector.norms()[0].first_to_grow is None
