"""OPT001, OPT002, OPT003 and BASE001."""

import pytest

from divergence_probe.record.schema import FLAGS, Event
from divergence_probe.rules.finding import Severity

from .blocks import HERE, OUTER_SITE, inner, make, one, outer, place, query, silent, start


def test_a_used_optimizer():
    event = start(2, carried_state=True, carried_steps=5, optimizer="Adam")

    finding = one("OPT001", make(inner(2), events=[event]))

    assert place(finding) == ("optimizer-state-carryover", Severity.WARNING, None, 2, 0)
    assert dict(finding.evidence) == {"steps": 5.0, "optimizer": "Adam"}
    assert finding.marks[0].site == HERE


def test_a_state_that_was_loaded_is_meant():
    event = start(2, carried_state=True, carried_steps=5, optimizer="Adam", loaded_state=True)

    finding = one("OPT001", make(inner(2), events=[event]))

    assert finding.severity is Severity.INFO and "were loaded into it" in finding.message


def test_a_used_optimizer_where_outer_steps_use_no_query():
    """What they follow is what the inner loops came to: a worker may well keep its optimizer."""
    used = start(2, seconds=2.5, carried_state=True, carried_steps=5, optimizer="AdamW")
    rows = [inner(), inner(1), outer(), inner(2)]
    assert one("OPT001", make(*rows, events=[used])).severity is Severity.INFO
    rows[1] = query(site=1)
    assert one("OPT001", make(*rows, events=[used])).severity is Severity.WARNING
    rows[1] = query(site=-1)  # a prediction
    assert one("OPT001", make(*rows, events=[used])).severity is Severity.INFO


def test_a_fresh_optimizer_or_one_that_means_to_go_on():
    fresh = start(2, carried_state=False, carried_steps=0, optimizer="Adam")
    goes_on = start(3, carried_state=True, carried_steps=5, continues=True)

    assert silent("OPT001", make(inner(2), events=[fresh, goes_on]))


def test_a_velocity_carried_by_hand():
    finding = one("OPT001", make(inner(1, carried_velocity=0.99999)))

    assert (finding.task, finding.step) == (1, 0)
    assert silent("OPT001", make(inner(1, carried_velocity=0.9), inner(1, 1, carried_velocity=1)))


def test_a_gradient_that_was_not_cleared():
    steps = (inner(1, 1, carried_gradient=2.5), inner(1, 2, carried_gradient=3.5))
    finding = one("OPT002", make(inner(1, 0), *steps))

    assert place(finding) == ("gradient-accumulation", Severity.ERROR, None, 1, 1)
    assert finding.evidence["carried_gradient_norm"] == 2.5


def test_a_single_leftover_is_only_a_remark():
    finding = one("OPT002", make(inner(0, 0, carried_gradient=2.5), inner(0, 1), inner(1, 0)))

    assert finding.severity is Severity.INFO


def test_gradients_that_are_cleared_or_belong_to_the_outer_step():
    assert silent("OPT002", make(inner(), inner(step=1), outer(carried_gradient=3.0)))


def clipped(active, count=10):
    both = FLAGS["clippable"] | FLAGS["clipped"]
    return [inner(0, i, flags=both if i < active else FLAGS["clippable"]) for i in range(count)]


def test_clipping_that_is_always_active():
    finding = one("OPT003", make(*clipped(10)))

    assert place(finding) == ("hard-clipping", Severity.WARNING, None, 0, 0)
    assert finding.evidence["share"] == 1.0 and finding.count == 10


def test_clipping_for_spikes_or_too_few_steps_to_say():
    assert silent("OPT003", make(*clipped(5)))
    assert silent("OPT003", make(*clipped(7, count=7)))
    assert one("OPT003", make(*clipped(5)), clipped_share=0.5)


def task(index, starts, ends):
    return inner(index, norm_before=starts, norm_after=ends)


def test_a_base_that_is_half_restored():
    block = make(task(0, [10, 1, 5], [12, 3, 5]), task(1, [12, 1, 5], [14, 3, 5]))

    finding = one("BASE001", block)

    assert place(finding) == ("base-mutated", Severity.WARNING, "body.0", 1, 0)
    assert finding.evidence["parameters_moved"] == 1.0


def test_a_base_that_goes_on_as_a_whole_may_be_meant():
    finding = one("BASE001", make(task(0, 10, 12), task(1, 12, 14)))

    assert finding.severity is Severity.INFO


def test_a_base_that_is_restored_or_moved_by_an_outer_step():
    assert silent("BASE001", make(task(0, 10, 12), task(1, 10, 13)))
    rows = (task(0, 10, 12), outer(norm_before=10, norm_after=11), task(1, 11, 13))
    assert silent("BASE001", make(*rows))


def test_an_outer_step_of_the_same_weights_in_another_layout():
    """A copy that lists more parameters than the base was adapted before and after it."""
    longer = ("body.0.weight", "body.0.bias", "head.weight", "extra")
    first, second = (
        make(task(0, 10, 12), parameters=longer),
        make(task(1, 11, 13), parameters=longer),
    )
    for block in (first, second):
        block.layout.index = 1
    step = make(outer(norm_before=10, norm_after=11))

    assert silent("BASE001", first, step, second)
    assert one("BASE001", first, second)


def test_another_model_of_the_same_structure_begins_where_it_likes():
    other = make(task(1, 12, 14), events=[start(1, instance=2)])
    assert silent("BASE001", make(task(0, 10, 12), events=[start(0, instance=1)]), other)

    same = make(task(1, 12, 14), events=[start(1, instance=1)])
    assert one("BASE001", make(task(0, 10, 12), events=[start(0, instance=1)]), same)


def test_a_norm_that_is_where_the_inner_loop_ended_by_accident():
    """Before its outer step the base is moved otherwise: adversarially, say."""
    moved = outer(norm_before=[11, 3, 5], norm_after=13)

    assert silent("BASE001", make(task(0, [10, 1, 5], [12, 3, 5]), moved))


def test_an_outer_step_that_starts_where_the_inner_loop_ended():
    finding = one("BASE001", make(task(0, 10, 12), outer(norm_before=12, norm_after=13)))

    assert (finding.phase, finding.severity) == ("outer", Severity.WARNING)
    assert finding.marks[0].site == OUTER_SITE


@pytest.mark.parametrize("site", [HERE, None])
def test_a_restore_without_effect(site):
    event = Event("restore-without-effect", site=site)

    finding = one("BASE001", make(inner(), events=[event, event]))

    assert (finding.cause, finding.severity) == ("base-mutated", Severity.WARNING)
    assert "deepcopy" in finding.fix and bool(finding.marks) == bool(site)
    assert silent("BASE001", make(inner(), events=[event]))  # a state saved just before it


@pytest.mark.parametrize(
    "facts", [{"in_place": False}, {"in_place": True, "copied": True}, {"writes_base": False}]
)
def test_steps_that_write_into_no_base_move_none(facts):
    """Weights of another agent, or a base that was moved by hand: what began was not written to."""
    events = [start(index, adapter="autograd.grad", **facts) for index in (0, 1)]

    assert silent("BASE001", make(task(0, 10, 12), task(1, 11, 13), events=events))
    carried = one("BASE001", make(task(0, 10, 12), task(1, 12, 14), events=events))
    assert carried.task == 1  # through another name of the same memory, say


@pytest.mark.parametrize("facts", [{"in_place": True}, {"in_place": True, "writes_base": True}])
def test_steps_that_write_into_the_base_may_have_moved_it(facts):
    events = [start(index, adapter="backward", **facts) for index in (0, 1)]

    assert one("BASE001", make(task(0, 10, 12), task(1, 11, 13), events=events))
