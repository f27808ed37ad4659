"""BN001, BN002 and BN004."""

import math

import pytest

from divergence_probe.rules.finding import Severity

from .blocks import evaluated, inner, make, one, outer, place, query, silent, train

NORMS = ["norm1", "norm2"]


def test_evaluating_untrained_statistics():
    columns = evaluated(bn_untrained=1, bn_mean_distance=[0.2, 3.0], bn_batches=0)

    finding = one("BN001", make(inner(2, **columns), batch_norms=NORMS))

    assert place(finding) == ("stale-running-stats", Severity.ERROR, "norm1", 2, 0)
    assert finding.layers == ("norm1", "norm2")  # wrong in both, if far in one
    assert finding.evidence["mean_distance"] == pytest.approx(3.0)
    assert finding.evidence["variance_ratio"] == pytest.approx(math.exp(0.1))
    assert "net.train()" in finding.fix


def test_a_variance_far_off_counts_in_both_directions():
    for ratio in (math.log(5), -math.log(5)):
        columns = evaluated(bn_untrained=1, bn_log_variance_ratio=ratio)
        assert one("BN001", make(inner(**columns), batch_norms=NORMS)).layer == "norm1"


def test_untrained_statistics_that_fit_the_data_do_no_harm():
    assert silent("BN001", make(inner(**evaluated(bn_untrained=1)), batch_norms=NORMS))


def test_train_mode_does_not_use_untrained_statistics():
    columns = train(bn_untrained=1, bn_mean_distance=9.0)

    assert silent("BN001", make(inner(**columns), query(**columns), batch_norms=NORMS))


def test_later_steps_are_not_judged_and_neither_are_unknown_distances():
    moved = evaluated(bn_untrained=1, bn_mean_distance=9.0)
    unknown = evaluated(
        bn_untrained=1, bn_mean_distance=float("nan"), bn_log_variance_ratio=float("nan")
    )
    block = make(inner(**unknown), inner(step=1, **moved), outer(**moved), batch_norms=NORMS)

    assert silent("BN001", block)


def test_statistics_of_a_later_step_that_were_never_trained():
    """MAML++ keeps statistics for each step; here more steps are taken than were trained."""
    fit, far = evaluated(), evaluated(bn_untrained=1, bn_mean_distance=[0.2, 5.0])

    finding = one("BN001", make(inner(**fit), inner(step=1, **far), batch_norms=NORMS))
    assert finding.step == 1 and "meta-training" in finding.fix

    # their distance grew with the steps: that of trained ones had, too, or they fitted at first
    grown = evaluated(bn_mean_distance=5.0)
    assert silent("BN001", make(inner(**grown), inner(step=1, **far), batch_norms=NORMS))
    close = inner(step=1, **evaluated(bn_untrained=1))
    assert silent("BN001", make(inner(**fit), close, inner(step=2, **far), batch_norms=NORMS))


def test_a_query_alone_is_judged():
    columns = evaluated(bn_untrained=1, bn_mean_distance=9.0)

    assert (
        one("BN001", make(inner(**train()), query(**columns), batch_norms=NORMS)).phase == "query"
    )


def test_evaluating_trained_statistics_far_away():
    columns = evaluated(bn_mean_distance=[2.5, 0.1], bn_batches=1)

    finding = one("BN002", make(inner(**columns), batch_norms=NORMS))

    assert place(finding) == ("stale-running-stats", Severity.WARNING, "norm1", 0, 0)
    assert finding.evidence["batches_seen"] == 1.0
    assert "of 1 batches" in finding.message and "before the inner loop" in finding.fix
    uncounted = one("BN002", make(inner(**columns | {"bn_batches": -1}), batch_norms=NORMS))
    assert "statistics, far from" in uncounted.message


def test_a_query_of_statistics_that_were_far_off_before_adapting():
    far = {"bn_mean_distance": [2.5, 0.1]}
    began, asked = inner(**train(**far)), query(**evaluated(**far))
    finding = one("BN002", make(began, asked, batch_norms=NORMS))
    assert (finding.layers, finding.phase) == (("norm1",), "query")
    assert finding.fix.startswith("net.train()  # for the query")
    assert one("BN002", make(began, batch_norms=NORMS), make(asked, batch_norms=NORMS))

    # moved there by this task's own adaptation, or followed it
    assert silent("BN002", make(inner(**train()), asked, batch_norms=NORMS))
    assert silent("BN002", make(began, query(**evaluated()), batch_norms=NORMS))
    assert silent("BN002", make(began, query(1, **evaluated(**far)), batch_norms=NORMS))


def test_evaluating_settled_statistics():
    assert silent("BN002", make(inner(**evaluated()), batch_norms=NORMS))
    untrained = evaluated(bn_untrained=1, bn_mean_distance=9.0)  # which is BN001's
    assert silent("BN002", make(inner(**untrained), batch_norms=NORMS))


def test_the_distance_can_be_set():
    columns = evaluated(bn_mean_distance=0.5)

    assert one("BN002", make(inner(**columns), batch_norms=NORMS), statistics_distance=0.4)
    columns = evaluated(bn_log_variance_ratio=math.log(3))
    assert one("BN002", make(inner(**columns), batch_norms=NORMS), statistics_ratio=2)


def test_a_handful_of_values():
    finding = one("BN004", make(inner(**train(values=[64, 5])), batch_norms=NORMS))

    assert place(finding) == ("tiny-bn-batch", Severity.WARNING, "norm2", 0, 0)
    assert finding.evidence["values_per_channel"] == 5.0


def test_enough_values_or_running_statistics():
    assert silent("BN004", make(inner(**train(values=8)), batch_norms=NORMS))
    assert silent("BN004", make(inner(**evaluated(bn_values=1)), batch_norms=NORMS))
    assert silent("BN004", make(inner(**train(values=5)), batch_norms=NORMS), values_per_channel=4)
