"""MG001 to MG004, and MEM001."""

import pytest

from divergence_probe.record.schema import MISSING, Event
from divergence_probe.rules.finding import Severity

from .blocks import (
    HERE,
    NAN,
    OUTER_SITE,
    findings,
    inner,
    make,
    one,
    outer,
    place,
    query,
    second_order,
    silent,
    start,
)

NOTHING = outer(gradient_norm=MISSING)


@pytest.mark.parametrize("gradient", [MISSING, 0.0])
def test_an_outer_step_without_a_gradient(gradient):
    finding = one("MG001", make(inner(), outer(gradient_norm=gradient), events=[start()]))

    assert place(finding) == ("no-meta-gradient", Severity.ERROR, None, None, None)
    assert finding.phase == "outer" and finding.marks[0].site == OUTER_SITE


def test_a_gradient_that_truly_is_zero():
    copied = start(copied=True)
    asked = query(query_gradient=0.0), query(1, query_gradient=0.0)
    assert silent("MG001", make(inner(), *asked, outer(gradient_norm=0.0), events=[copied]))
    lost = query(1, query_gradient=2.0)
    assert one("MG001", make(inner(), asked[0], lost, outer(gradient_norm=0.0), events=[copied]))
    # an absent one is another matter
    assert one("MG001", make(inner(), *asked, NOTHING, events=[copied]))


def test_where_no_query_was_seen_the_last_inner_steps_speak():
    zero = outer(gradient_norm=0.0)
    dead = [inner(0, 0), inner(0, 1, gradient_norm=0.0)]
    assert silent("MG001", make(*dead, zero, events=[start()]))
    assert one("MG001", make(*dead, inner(1), zero, events=[start()]))
    assert one("MG001", make(*dead, inner(1), events=[start()]), make(zero))


def test_a_zero_that_a_backward_brought():
    """A hinge whose margin every sample of the query has; not the zeros of ``zero_grad``."""
    rows = inner(), outer(gradient_norm=0.0)

    def stepped(reached):
        return Event("outer-step", -1, -1, 100.0, OUTER_SITE, {"reached": reached})

    assert silent("MG001", make(*rows, events=[start(), stepped(True)]))
    assert one("MG001", make(*rows, events=[start(), stepped(False)]))


@pytest.mark.parametrize(
    ("data", "fix"),
    [
        ({"adapter": "higher", "copy_initial_weights": True}, "copy_initial_weights=False"),
        (
            {"adapter": "higher", "copy_initial_weights": False, "track_higher_grads": False},
            "track_higher_grads=True",
        ),
        ({"copied": True}, "p.grad = q.grad"),
        ({}, "no .data"),
    ],
)
def test_why_there_is_none(data, fix):
    assert fix in one("MG001", make(inner(), NOTHING, events=[start(**data)])).fix


def test_a_gradient_for_some_parameters_or_nothing_adapted_yet():
    some = outer(gradient_norm=[MISSING, 0.0, 0.5])
    assert silent("MG001", make(inner(), some, events=[start()]))
    assert silent("MG001", make(inner(), outer(gradient_norm=NAN), events=[start()]))
    assert silent("MG001", make(NOTHING))


def partly(outer_gradient, inner_update, steps=3):
    moved = inner(update_norm=inner_update)
    rows = [row for _ in range(steps) for row in (moved, outer(gradient_norm=outer_gradient))]
    return make(*rows, events=[start()])


def test_a_parameter_that_tasks_adapt_and_no_outer_step_has_a_gradient_for():
    finding = one("MG001", partly([1.0, MISSING, 1.0], [1.0, 1.0, 0.0]))

    assert finding.severity is Severity.INFO and "3 outer steps" in finding.message
    assert silent("MG001", partly([1.0, MISSING, 1.0], [1.0, 0.0, 1.0]))  # it is not adapted
    assert silent("MG001", partly([1.0, MISSING, 1.0], 1.0, steps=2))
    once = make(outer(gradient_norm=1.0), events=[start()])
    assert silent("MG001", once, partly([1.0, MISSING, 1.0], 1.0))


def unrolled(meta, row=second_order):
    steps = [row(inner(0, step, gradient_norm=[1, 0, 0])) for step in range(3)]
    return make(*steps, outer(gradient_norm=[meta, 0, 0]), events=[start()])


def test_a_meta_gradient_that_explodes():
    finding = one("MG002", unrolled(8000.0))

    assert place(finding) == ("meta-gradient-explosion", Severity.ERROR, None, None, None)
    assert finding.evidence["growth_per_step"] == pytest.approx(20.0)


def test_a_meta_gradient_of_ordinary_size():
    assert silent("MG002", unrolled(900.0))
    assert silent("MG002", unrolled(NAN))  # which is NF002's
    assert silent("MG002", unrolled(8000.0, row=dict))  # first order: nothing was unrolled
    assert silent("MG002", unrolled(8000.0), meta_gradient_growth=1e4)


@pytest.mark.parametrize(("loss", "exploded"), [(1e-3, True), (50.0, False)])
def test_a_query_whose_loss_is_of_another_scale(loss, exploded):
    """Adapted by a loss that is averaged twice: its gradients say nothing of the query's."""
    steps = [
        second_order(inner(0, step, gradient_norm=1e-3, loss=1e-3, norm_before=5.0))
        for step in range(3)
    ]
    asked = query(step=3.0, loss=loss, norm_before=MISSING)
    seen = findings("MG002", make(*steps, asked, outer(gradient_norm=10.0), events=[start()]))

    assert len(seen) == exploded
    assert all("each of 3 unrolled steps" in finding.message for finding in seen)


def test_first_order_gradients_only():
    finding = one("MG003", make(inner(), inner(step=1), outer()))

    assert place(finding) == ("first-order-only", Severity.INFO, None, 0, 1)
    assert "or the update drops it" in finding.message  # which a recording does not tell apart


def test_an_evaluation_after_the_last_outer_step_is_none_of_it():
    """Outer steps of what no task adapts come in a block of their own, after the tasks'."""
    trained, evaluated = second_order(inner()), inner(1)
    block = make(trained, inner(2), trained | {"task": 3}, inner(4))  # a second each

    assert silent("MG003", block, make(outer(), since=0.5), make(outer(), since=2.5))
    assert one("MG003", block, make(outer(), since=0.5), make(outer(), since=1.5)).task == 2
    assert silent("MG003", make(trained, evaluated), make(outer(), since=0.5))


def test_second_order_gradients_or_no_outer_step():
    assert silent("MG003", make(second_order(inner()), outer()))
    assert silent("MG003", make(inner()))
    assert silent("MG003", make(inner(), NOTHING))  # which is MG001's


def test_parameters_that_get_no_gradient():
    finding = one("MG004", make(inner(gradient_norm=[1, 1, MISSING])))

    assert place(finding) == ("unused-parameters", Severity.INFO, "head", 0, 0)
    assert "head.weight" in finding.message


def test_parameters_the_loop_does_not_hold_or_a_zero_gradient():
    absent = inner(gradient_norm=[1, 1, MISSING], norm_before=[10, 10, MISSING])
    assert silent("MG004", make(absent))
    assert silent("MG004", make(inner(gradient_norm=[1, 1, 0])))
    assert silent("MG004", make(inner(gradient_norm=MISSING)))


def test_graphs_that_are_kept():
    event = Event("graph-retained", 4, 2, 0.0, HERE, {"tasks": 3})

    finding = one("MEM001", make(inner(), events=[event]))

    assert place(finding) == ("graph-retained", Severity.WARNING, None, 4, None)
    assert finding.evidence["tasks"] == 3.0 and finding.marks[0].site == HERE
    assert silent("MEM001", make(inner(), events=[start(4)]))


def idle_optimizer(steps=20):
    return Event(
        "optimizer-without-gradient", -1, -1, 9.0, OUTER_SITE, {"steps": steps, "optimizer": "Adam"}
    )


def test_an_optimizer_that_never_had_a_gradient():
    finding = one("MG001", make(inner(), events=[start(), idle_optimizer()]))

    assert place(finding) == ("no-meta-gradient", Severity.WARNING, None, None, None)
    assert "Adam stepped 20 times" in finding.message
    assert finding.marks[0].site == OUTER_SITE


def test_an_optimizer_without_gradients_where_there_is_no_inner_loop():
    assert silent("MG001", make(inner(), events=[idle_optimizer()]))


def test_a_meta_gradient_beside_those_of_an_inner_loop_that_has_converged():
    """Next to nothing is left of its gradients; the losses and weights tell what is much."""
    still = [second_order(inner(step=i, gradient_norm=1e-7, loss=1.0)) for i in range(3)]
    assert silent("MG002", make(*still, outer(gradient_norm=1.0)))
    assert one("MG002", make(*still, outer(gradient_norm=1e4)))
