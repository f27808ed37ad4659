"""BN003, BN005 and BN006."""

from divergence_probe.record.schema import Event
from divergence_probe.rules.finding import Severity

from .blocks import (
    HERE,
    end,
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


def moving(task, before, after, weights=10.0):
    columns = train(
        bn_shared=[0, 1], bn_running_mean_before=before, bn_running_mean_after=after, bn_drift=0.3
    )
    return inner(task, norm_before=weights, norm_after=weights + 1, **columns)


def test_the_next_task_starts_from_moved_statistics():
    finding = one("BN003", make(moving(0, 0.0, 1.0), moving(1, 1.0, 2.0), batch_norms=NORMS))

    assert place(finding) == ("running-stats-leak", Severity.WARNING, "norm2", 0, 0)
    assert finding.marks[0].site == HERE
    assert finding.evidence["drift"] == 0.3


def test_the_leak_is_seen_over_blocks():
    blocks = [make(moving(task, task, task + 1.0), batch_norms=NORMS) for task in range(3)]

    assert one("BN003", *blocks).count == 2


def test_statistics_that_are_put_back():
    assert silent("BN003", make(moving(0, 0.0, 1.0), moving(1, 0.0, 1.0), batch_norms=NORMS))


def known_late(task, first, after):
    """A copy used for every task: whose buffers its first forward moves is not known yet."""
    rows = [moving(task, first, after), moving(task, after, after + 1)]
    unknown = {"bn_shared": 0} if task == 0 else {}
    return [rows[0] | unknown, rows[1] | {"step": 1}]


def test_statistics_are_compared_at_first_forwards():
    block = make(*known_late(0, 0.0, 1.0), *known_late(1, 0.0, 1.0), batch_norms=NORMS)
    assert silent("BN003", block)

    block = make(*known_late(0, 0.0, 1.0), *known_late(1, 2.0, 3.0), batch_norms=NORMS)
    assert one("BN003", block).task == 0


def test_statistics_that_go_on_with_the_weights():
    rows = (moving(0, 0.0, 1.0), moving(1, 1.0, 2.0, weights=11.0))

    assert silent("BN003", make(*rows, batch_norms=NORMS))


def test_inputs_that_are_attacked_while_the_model_is_in_training():
    rows = (moving(0, 0.0, 1.0), moving(1, 1.0, 2.0))
    inputs = ("param[0] 8x3x4x4",)
    step = Event("outer-step", -1, -1, 0.5, HERE, {"without_gradient": []})

    trained = one("BN003", make(*rows, batch_norms=NORMS, parameters=inputs, events=[step]))
    assert trained.severity is Severity.INFO
    tested = one("BN003", make(*rows, batch_norms=NORMS, parameters=inputs))
    assert tested.severity is Severity.WARNING


def test_statistics_of_a_copy_or_in_eval_mode():
    columns = {"bn_running_mean_before": 0.0, "bn_running_mean_after": 1.0}
    copies = [inner(task, **train(bn_shared=0, **columns)) for task in (0, 1)]
    assert silent("BN003", make(*copies, batch_norms=NORMS))
    still = [inner(task, **evaluated(bn_shared=1, **columns)) for task in (0, 1)]
    assert silent("BN003", make(*still, batch_norms=NORMS))


def test_an_evaluated_query_in_train_mode():
    block = make(inner(**train()), query(**train(bn_training=[0, 1])), batch_norms=NORMS)

    finding = one("BN005", block)

    assert place(finding) == ("transductive-batch-statistics", Severity.INFO, "norm2", 0, None)
    assert finding.evidence["statistics_pass_between_tasks"] == 0.0


def test_a_query_in_train_mode_that_is_trained_on():
    assert silent("BN005", make(query(**train()), outer(), batch_norms=NORMS))
    assert silent("BN005", make(query(**train()), batch_norms=NORMS), make(outer()))


def test_a_query_in_eval_mode_or_without_statistics():
    assert silent("BN005", make(query(**evaluated()), batch_norms=NORMS))
    assert silent("BN005", make(query(**train(bn_shared=-1)), batch_norms=NORMS))


def recomputed(layer, task=0):
    return Event("recomputed", task, 0, 0.0, HERE, {"layer": layer})


def test_a_recomputed_forward():
    events = [start(), recomputed("norm2"), recomputed("norm1")]

    finding = one("BN006", make(inner(**train()), batch_norms=NORMS, events=events))

    assert place(finding) == ("double-bn-update", Severity.WARNING, "norm1", 0, None)
    assert finding.layers == ("norm1", "norm2") and finding.marks[0].site == HERE


def test_an_ordinary_forward():
    assert silent("BN006", make(inner(**train()), batch_norms=NORMS, events=[start(), end()]))
