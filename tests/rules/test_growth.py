"""NG001 and LG001."""

import pytest

from divergence_probe.record.schema import QUERY
from divergence_probe.rules.finding import Severity

from .blocks import HERE, end, findings, inner, make, one, place, silent, start


def grown(last, losses=(1.0, 2.0, 3.0), task=0):
    norms = [10.0, 12.0, 50.0, last]
    return [
        inner(
            task, step, loss=losses[step],
            norm_before=[norms[step], 1, 10], norm_after=[norms[step + 1], 1, 10],
            update_norm=[norms[step + 1] - norms[step], 0, 0],
        )
        for step in range(3)
    ]  # fmt: skip


def test_a_decade_in_one_task_is_an_explosion():
    finding = one("NG001", make(*grown(150.0)))

    assert place(finding) == (None, Severity.ERROR, "body.0", 0, 2)
    assert finding.layers == ("body.0",)
    assert finding.evidence["growth"] == pytest.approx(15.0)
    assert "body.0.weight ‖w‖ 10 → 150 in 3 steps" in finding.message
    assert finding.marks[0].site == HERE


def test_less_than_a_decade_is_not():
    assert silent("NG001", make(*grown(99.0)))


def test_a_decade_with_a_falling_loss_is_not():
    assert silent("NG001", make(*grown(150.0, losses=(3.0, 2.0, 1.0))))


def test_a_decade_with_a_reward_that_rises_along_steps_up_is_not():
    rows = [{**row, "step_rate": -0.1} for row in grown(150.0)]

    assert silent("NG001", make(*rows))


def test_a_decade_with_a_reward_that_falls_along_steps_up_is():
    rows = [{**row, "step_rate": -0.1} for row in grown(150.0, losses=(3.0, 2.0, 1.0))]
    rows[2]["loss"] = 4.0

    assert silent("NG001", make(*rows[:2]))
    assert one("NG001", make(*[{**row, "loss": 3.0} for row in rows])).layers == ("body.0",)


def test_a_step_that_throws_weights_far_and_is_recovered_from_is_not():
    """As of weights before BatchNorm over a few values, which have no scale."""
    norms, losses = [11.3, 28.0, 157.6, 157.7, 157.7], (0.45, 1.85, 2.55, 0.012)
    rows = [
        inner(
            step=step, loss=losses[step],
            norm_before=[norms[step], 1, 10], norm_after=[norms[step + 1], 1, 10],
        )
        for step in range(4)
    ]  # fmt: skip

    assert silent("NG001", make(*rows))
    assert one("NG001", make(*rows[:3])).step == 1


@pytest.mark.parametrize(("query", "explodes"), [(None, False), (3.0, False), (40.0, True)])
def test_of_a_single_step_the_query_tells(query, explodes):
    """A learned context begins next to nothing: how much it grows says little by itself."""
    rows = [inner(step=0, loss=2.0, norm_before=[1e-3, 0, 0], norm_after=[0.05, 0, 0])]
    if query is not None:
        rows.append(inner(step=1, loss=query, phase=QUERY, norm_before=[-1] * 3))

    assert len(findings("NG001", make(*rows))) == explodes


def test_three_decades_are_whatever_the_loss_does():
    assert one("NG001", make(*grown(1.1e4, losses=(3.0, 2.0, 1.0)))).step == 2


def test_targets_of_another_scale_are_reached():
    """Regression of values in the thousands, from weights as they are made by default."""
    norms, losses = [0.5, 600.0, 1000.0, 1200.0], [3e6, 1e6, 4e5, 1e5]

    def steps(losses):
        return [
            inner(0, step, loss=losses[step], norm_before=[norms[step], 1, 0.1],
                  norm_after=[norms[step + 1], 1, 0.1],
                  update_norm=[norms[step + 1] - norms[step], 0, 0])
            for step in range(3)
        ]  # fmt: skip

    assert silent("NG001", make(*steps(losses)))
    assert one("NG001", make(*steps([1e6, 3e6, 4e5])))  # it rose in between


def test_a_zero_initialised_head_may_grow():
    rows = [
        inner(step=0, norm_before=[10, 1, 0], norm_after=[10, 1, 0.2]),
        inner(step=1, norm_before=[10, 1, 0.2], norm_after=[10, 1, 2.5]),
    ]

    assert silent("NG001", make(*rows))


def test_a_small_parameter_has_no_scale_of_its_own():
    """A bias of 0.02 in a model of norms around 10 may become 6, whatever the loss does."""
    first = inner(norm_before=[10, 0.4, 8], norm_after=[10, 0.5, 8])
    grown = make(first, inner(step=1, norm_after=[10, 6, 8], loss=2.0))
    assert silent("NG001", grown)

    everything = make(first, inner(step=1, norm_after=[10, 90, 8], loss=2.0))
    assert one("NG001", everything).layer == "body.0"


def test_growth_is_measured_from_the_task_start_over_blocks():
    rows = grown(150.0)

    finding = one("NG001", make(rows[0], events=[start()]), make(rows[1]), make(rows[2]))

    assert (finding.task, finding.step, finding.evidence["norm_before"]) == (0, 2, 10.0)


def test_the_next_task_has_its_own_start():
    first, second = grown(99.0), [inner(1, norm_before=[99, 1, 10], norm_after=[120, 1, 10])]

    assert silent("NG001", make(*first, events=[start(0), end(0)]), make(*second))


def test_the_bound_can_be_set():
    assert silent("NG001", make(*grown(150.0)), norm_growth=16)
    assert one("NG001", make(*grown(99.0)), norm_growth=9)


def test_a_loss_that_grows_by_decades():
    rows = [inner(4, step, loss=loss) for step, loss in enumerate((2.0, 30.0, 250.0))]

    finding = one("LG001", make(*rows))

    assert place(finding) == (None, Severity.ERROR, None, 4, 2)
    assert dict(finding.evidence) == {"first_loss": 2.0, "loss": 250.0}


def test_a_loss_that_doubles_is_noise():
    assert silent("LG001", make(inner(loss=2.0), inner(step=1, loss=4.0), inner(step=2, loss=1.0)))


def test_one_easy_sample_does_not_make_the_next_loss_an_explosion():
    usual = [inner(task, loss=1.0) for task in range(3)]
    easy = [inner(3, loss=0.01), inner(3, step=1, loss=2.0)]

    assert silent("LG001", make(*usual, *easy))
    assert one("LG001", make(*easy)).evidence["loss"] == 2.0
    assert one("LG001", make(*usual, inner(3, loss=0.01), inner(3, step=1, loss=150.0)))
    elsewhere = [inner(task, loss=1.0, site=1) for task in range(3)]
    assert one("LG001", make(*elsewhere, *easy))


def test_a_loss_that_began_at_zero_has_a_floor():
    assert silent("LG001", make(inner(loss=1e-9), inner(step=1, loss=0.5)))


def test_the_query_of_an_exploded_loss_is_not_another_task():
    rows = [inner(task, step, loss=loss) for task in (0, 1) for step, loss in ((0, 1), (1, 500))]

    assert findings("LG001", make(*rows))[0].count == 2
