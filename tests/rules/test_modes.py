"""MODE001, MODE002 and MODE003."""

from divergence_probe.record.schema import Event
from divergence_probe.rules.finding import Severity

from .blocks import (
    HERE,
    QUERY_SITE,
    evaluated,
    inner,
    make,
    one,
    outer,
    place,
    query,
    silent,
    start,
    train,
)

NORMS = ["norm1", "norm2"]


def test_a_query_in_another_mode():
    block = make(inner(**train()), query(**evaluated(bn_training=[1, 0])), batch_norms=NORMS)

    finding = one("MODE001", block)

    cause = "train-eval-mismatch"
    assert place(finding) == (cause, Severity.WARNING, "norm2", 0, None)
    assert finding.phase == "query" and finding.marks[0].site == QUERY_SITE
    assert dict(finding.evidence) == {"support": "train", "query": "eval"}


def test_a_query_of_dropout_in_another_mode_one_block_later():
    first = make(inner(dropout=1), dropouts=["drop"], events=[start()])
    second = make(query(dropout=0), dropouts=["drop"])

    assert one("MODE001", first, second).layer == "drop"


def test_a_layer_the_query_does_not_call_has_no_mode():
    block = make(inner(**train()), query(**train(bn_training=[1, -1])), batch_norms=NORMS)

    assert silent("MODE001", block)


def test_the_support_and_query_of_different_tasks_may_differ():
    block = make(
        inner(0, **train()), query(0, **train()), inner(1, **evaluated()), query(1, **evaluated()),
        batch_norms=NORMS,
    )  # fmt: skip

    assert silent("MODE001", block)


def switch(target="base", mode="eval", was="train"):
    return Event("mode", 0, 1, 0.5, HERE, {"target": target, "mode": mode, "was": was})


def test_a_switch_of_the_base_does_not_reach_the_fast_model():
    block = make(
        inner(**train()), inner(step=1, **train()), batch_norms=NORMS, events=[start(), switch()]
    )

    finding = one("MODE002", block)

    assert place(finding) == ("mode-not-propagated", Severity.WARNING, "norm1", 0, 1)
    assert finding.layers == ("norm1", "norm2")
    assert finding.marks[0].site == HERE
    assert dict(finding.evidence) == {"called": "eval", "runs_in": "train"}


def test_a_switch_that_reached_the_layers_or_changed_nothing():
    rows = (inner(**train()), inner(step=1, **evaluated()))
    assert silent("MODE002", make(*rows, batch_norms=NORMS, events=[switch()]))

    rows = (inner(**train()), inner(step=1, **train()))
    unchanged = switch(mode="eval", was="eval")
    assert silent("MODE002", make(*rows, batch_norms=NORMS, events=[unchanged]))
    both = [switch(), switch(target="fast", mode="train", was="eval")]
    assert silent("MODE002", make(*rows, batch_norms=NORMS, events=both))


def test_dropout_in_an_evaluated_query():
    block = make(inner(dropout=1), query(dropout=[0, 1]), dropouts=["first", "second"])

    finding = one("MODE003", block)

    assert place(finding) == (None, Severity.INFO, "second", 0, None)


def test_dropout_in_a_query_that_is_trained_on():
    block = make(
        inner(dropout=1), query(dropout=1), outer(), dropouts=["drop"],
        events=[Event("outer-step")],
    )  # fmt: skip

    assert silent("MODE003", block)


def test_dropout_that_passes_everything_through():
    assert silent("MODE003", make(inner(dropout=1), query(dropout=0), dropouts=["drop"]))
