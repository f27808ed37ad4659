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
        events=[Event("outer-step", seconds=2.0)],
    )  # fmt: skip

    assert silent("MODE003", block)


def test_dropout_in_a_query_after_the_last_that_was_trained_on():
    block = make(
        inner(dropout=1), query(dropout=1), outer(), inner(task=1), query(task=1, dropout=1),
        dropouts=["drop"], events=[Event("outer-step", seconds=2.0)],
    )  # fmt: skip

    assert one("MODE003", block).task == 1


def test_dropout_that_passes_everything_through():
    assert silent("MODE003", make(inner(dropout=1), query(dropout=0), dropouts=["drop"]))


def predicted(task=0, **columns):
    """A query no gradient is taken of: it has no line of its own."""
    return query(task, **{"site": -1, **columns})


def test_a_prediction_in_eval_mode_is_what_everyone_does():
    finding = one("MODE001", make(inner(**train()), predicted(**evaluated()), batch_norms=NORMS))

    assert place(finding) == ("train-eval-mismatch", Severity.INFO, "norm1", 0, None)
    drop = make(inner(dropout=1), predicted(dropout=0), dropouts=["drop"])
    assert one("MODE001", drop).severity is Severity.INFO


def test_a_prediction_from_statistics_that_do_not_fit():
    far = evaluated(bn_mean_distance=[0.2, 1.5])
    block = make(inner(**train()), predicted(**far), batch_norms=NORMS)
    assert one("MODE001", block).severity is Severity.WARNING

    fresh = inner(**train(bn_untrained=1))  # moved by this task's own few batches only
    block = make(fresh, predicted(**evaluated()), batch_norms=NORMS)
    assert one("MODE001", block).severity is Severity.WARNING
    still = make(inner(**train()), predicted(**evaluated(bn_untrained=1)), batch_norms=NORMS)
    assert one("MODE001", still).severity is Severity.WARNING


def test_the_first_of_several_models_predicts_with_what_one_task_has_trained():
    """Each client has statistics of its own; a later task of theirs begins on trained ones."""
    first = inner(**train(bn_untrained=1)), predicted(**evaluated())
    later = inner(1, **train()), predicted(1, **evaluated())
    assert one("MODE001", make(*first, *later, batch_norms=NORMS)).severity is Severity.INFO
    fresh = inner(1, **train(bn_untrained=1)), predicted(1, **evaluated())
    assert one("MODE001", make(*first, *fresh, batch_norms=NORMS)).severity is Severity.WARNING


def test_a_prediction_in_train_mode_after_adapting_in_eval_mode():
    block = make(inner(**evaluated()), predicted(**train()), batch_norms=NORMS)
    assert one("MODE001", block).severity is Severity.WARNING
    drop = make(inner(dropout=0), predicted(dropout=1), dropouts=["drop"])
    assert one("MODE001", drop).severity is Severity.WARNING


def test_a_query_an_outer_step_uses_is_no_prediction():
    """Losses of several queries may be summed first: then no task has a gradient of its own."""
    rows = (inner(**train()), predicted(**evaluated()))
    assert one("MODE001", make(*rows, outer(), batch_norms=NORMS)).severity is Severity.WARNING
    blocks = make(*rows, batch_norms=NORMS), make(outer(), batch_norms=NORMS)
    assert one("MODE001", *blocks).severity is Severity.WARNING


def test_predictions_between_two_outer_steps():
    """The outer step belongs to the tasks whose queries a gradient was taken of."""
    rows = (
        inner(**train()), predicted(**evaluated()), inner(1, **train()), query(1, **train()),
        outer(),
    )  # fmt: skip

    assert one("MODE001", make(*rows, batch_norms=NORMS)).severity is Severity.INFO
