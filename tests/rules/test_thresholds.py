"""The numbers in force. That overrides change what rules say is tested rule by rule."""

import numpy as np
import pytest

from divergence_probe import attach
from divergence_probe.errors import UsageError
from divergence_probe.thresholds import CATALOGUE, Thresholds, parse_overrides

from .blocks import inner, make, one, silent


def test_defaults_and_overrides():
    thresholds = Thresholds({"norm-growth": 5.0})

    assert thresholds["norm-growth"] == 5.0
    assert thresholds["loss-growth"] == 100.0
    assert all(t.unit and t.source for t in CATALOGUE)


def test_an_override_changes_the_outcome():
    block = make(inner(loss=1.0), inner(step=1, loss=50.0))

    assert silent("LG001", block)
    assert one("LG001", block, loss_growth=40)


def test_an_unknown_name_is_an_error_that_helps():
    with pytest.raises(UsageError, match=r"no threshold named 'norm-grow'\. Did you mean norm-gro"):
        Thresholds({"norm-grow": 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "5", None, True, 10**400, [5.0]])
def test_a_value_that_would_silence_or_break_a_rule_is_an_error(value):
    with pytest.raises(UsageError, match=r"norm-growth is .*finite number"):
        Thresholds({"norm-growth": value})
    with pytest.raises(UsageError, match="norm-growth is"):
        attach(thresholds={"norm-growth": value})


def test_numbers_of_other_kinds_are_taken():
    thresholds = Thresholds({"norm-growth": np.float32(5), "values-per-channel": np.int64(3)})

    assert (thresholds["norm-growth"], thresholds["values-per-channel"]) == (5.0, 3.0)
    with pytest.raises(UsageError, match="names and numbers"):
        Thresholds([("norm-growth", 5.0)])
    with pytest.raises(UsageError, match="no threshold named 5"):
        Thresholds({5: 5.0})


def test_texts():
    assert parse_overrides(["norm-growth=5", " instability = 1.5"]) == {
        "norm-growth": 5.0, "instability": 1.5,
    }  # fmt: skip
    for text in (
        "norm-growth",
        "norm-growth=",
        "norm-growth=many",
        "norm-growth=nan",
        "norm-growth=inf",
        "norm-growth=-1",
        "=3",
        "nothing=3",
    ):
        with pytest.raises(UsageError):
            parse_overrides([text])
