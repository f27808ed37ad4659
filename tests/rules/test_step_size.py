"""LR001, LR002, LR003 and LR004."""

import pytest

from divergence_probe.record.schema import FLAGS, MISSING, Event
from divergence_probe.rules.finding import Severity

from .blocks import HERE, INF, NAN, findings, inner, make, one, outer, place, query, silent, start

ONE = ("layer.weight",)


def quadratic(product, steps=4, rate=0.1, **columns):
    """Gradient descent on curvature / 2 * w**2, with step size x curvature ``product``, exactly."""
    curvature, w, rows = product / rate, 1.0, []
    for step in range(steps):
        gradient, new = curvature * w, w * (1 - product)
        rows.append(
            inner(
                0, step, loss=curvature / 2 * w**2, learning_rate=rate,
                instability=product if step else NAN, gradient_norm=abs(gradient),
                update_norm=abs(new - w), norm_before=abs(w), norm_after=abs(new),
                step_rate=rate, **columns,
            )
        )  # fmt: skip
        w = new
    return make(*rows, parameters=ONE)


def test_steps_beyond_stability():
    finding = one("LR001", quadratic(2.5))

    assert place(finding) == ("inner-lr-too-high", Severity.WARNING, "layer", 0, 2)
    assert finding.evidence["step_size_x_curvature"] == pytest.approx(2.5)
    assert finding.evidence["largest_stable_learning_rate"] == pytest.approx(0.08)
    assert finding.evidence["overflow_at_step"] > 100  # 3.4e38 at x 1.5 a step
    assert "lr = 0.08" in finding.fix


def test_a_loss_that_ends_above_zero_bounds_less_than_two_gradients_show():
    block = quadratic(12.0, rate=12.0)
    block.scalars["loss"] = block.scalars["loss"] + 2.0

    finding = one("LR001", block)

    assert finding.evidence["step_size_x_curvature"] == pytest.approx(12.0)
    assert finding.evidence["largest_stable_learning_rate"] == pytest.approx(2.0)


def test_a_decade_at_once_is_clear_after_one_step():
    assert one("LR001", quadratic(6.0)).step == 1


def test_what_a_net_makes_of_gradients_need_not_go_on_growing():
    assert one("LR001", quadratic(2.5, steps=3))
    assert silent("LR001", quadratic(2.5, steps=3, flags=float(FLAGS["transformed"])))

    grown = one("LR001", quadratic(6.0, steps=6, flags=float(FLAGS["transformed"])))
    assert grown.step == 3 and not grown.fix


@pytest.mark.parametrize("product", [0.5, 1.0, 1.9, 2.0])
def test_stable_steps(product):
    assert silent("LR001", quadratic(product, steps=8))


def test_a_high_product_with_a_falling_loss_is_the_edge_of_stability():
    block = quadratic(2.5)
    block.scalars["loss"] = block.scalars["loss"][::-1].copy()

    assert silent("LR001", block)


def test_the_limit_can_be_set():
    assert silent("LR001", quadratic(2.5), instability=2.6)


def test_a_rise_that_the_slope_does_not_explain_is_another_batch():
    """0.03 to 3 over a step that promised 0.001: a sample of another class, not the step."""
    rows = quadratic(6.0, steps=3)
    assert one("LR001", rows).step == 1
    rows.parameters["gradient_norm"] /= 30  # the decrease a step promises goes with its square
    assert silent("LR001", rows)


def thrown_about(task, steps=5, rate=0.1):
    """Short steps whose loss goes up and down by batches, whatever their slopes promise."""
    return [
        inner(
            task, step, loss=(2.0, 0.5)[step % 2], instability=0.3 if step else NAN,
            gradient_norm=1.0, update_norm=rate, step_rate=rate, norm_after=10.0,
        )
        for step in range(steps)
    ]  # fmt: skip


def overshooting(product, steps, task):
    block = quadratic(product, steps=steps)
    block.scalars["task"][:] = task
    return block


def test_slopes_of_fresh_batches_that_disagree_twice():
    assert one("LR001", overshooting(2.5, 3, task=1)).step == 2
    known = make(*thrown_about(0), parameters=ONE)
    assert silent("LR001", known, overshooting(2.5, 3, task=1))


def test_fresh_batches_and_steps_that_are_too_long_all_the_same():
    known = make(*thrown_about(0), parameters=ONE)

    assert one("LR001", known, overshooting(3.0, 8, task=1)).step == 3  # the third, over a decade


def test_losses_that_go_as_their_slopes_foretell_are_of_one_batch():
    rows = thrown_about(0)
    for step, row in enumerate(rows):  # the trapezoid rule of a step of 0.1 and slopes of 1 and 0.7
        row["loss"] = 2.0 - 0.085 * step

    assert one("LR001", make(*rows, parameters=ONE), overshooting(2.5, 3, task=1)).step == 2


def test_a_decade_counts_over_one_step_only():
    rows = quadratic(2.2, steps=2)
    rows.scalars["loss"][:] = 0.4, 0.5
    first = make(inner(0, loss=0.03, instability=NAN), parameters=ONE)
    rows.scalars["step"] += 1
    rows.scalars["instability"][0] = 0.5

    assert silent("LR001", first, rows)


def kinked(losses=(1.5, 0.7, 3.0, 9.0), product=1.2, rate=0.1, task=0):
    """Steps into a wall: the slope just turns round, the decrease promised is above the loss."""
    gradients = [(0.5, 6.0, 20.0, 40.0)[step] for step in range(len(losses))]
    return [
        inner(
            task, step, loss=losses[step], instability=product if step else NAN,
            gradient_norm=gradient, update_norm=rate * gradient, step_rate=rate, norm_after=10.0,
        )
        for step, gradient in enumerate(gradients)
    ]  # fmt: skip


def test_steps_over_a_valley_with_a_wall():
    finding = one("LR001", make(*kinked(), parameters=ONE))

    assert place(finding) == ("inner-lr-too-high", Severity.WARNING, "layer", 0, 3)
    decrease = 0.1 * 20.0**2  # from a loss of 3
    assert finding.evidence["step_size_x_curvature"] == pytest.approx(decrease / (2 * 3.0))


def test_a_rising_loss_that_the_step_is_not_too_long_for():
    assert silent("LR001", make(*kinked(rate=0.001), parameters=ONE))  # another batch, say
    assert silent("LR001", make(*kinked(product=0.8), parameters=ONE))  # the slope goes on
    assert silent("LR001", make(*kinked((90.0, 0.7, 3.0, 9.0)), parameters=ONE))


def test_a_bounded_loss_that_long_steps_throw_about():
    block = make(*kinked((0.04, 0.07, 0.11, 0.12), rate=0.1), parameters=ONE)
    block.parameters["gradient_norm"][:, 0] = 2.0, 2.4, 2.6, 2.7
    assert silent("LR001", block)
    assert silent("LR001", make(*kinked((1.5, 0.7, 1.6, 2.0)), parameters=ONE))


def test_a_loss_that_zero_does_not_bound():
    """A policy gradient's is zero on average: how far it could fall is not known from its value."""
    first = inner(0, loss=-0.1, gradient_norm=1.0)
    assert silent("LR001", make(first, *kinked(task=1), parameters=ONE))


def tiny(update, loss=1.0):
    return [inner(0, step, update_norm=update, loss=loss) for step in range(3)]


def test_steps_without_effect():
    finding = one("LR002", make(*tiny(1e-5)))

    assert place(finding) == ("ineffective-inner-step", Severity.WARNING, None, 0, 0)
    assert finding.evidence["largest_relative_update"] == pytest.approx(1e-6)


def test_steps_with_effect_or_nothing_left_to_learn():
    assert silent("LR002", make(*tiny([1e-5, 1e-5, 1e-2])))
    assert silent("LR002", make(*tiny(1e-5, loss=1e4)))  # the gradient is small beside the loss
    assert silent("LR002", make(*tiny(0.0)))  # which is LR004's: at rate 0.1 it would show
    assert silent("LR002", make(*tiny(1e-5)), ineffective_update=1e-7)


def test_a_bias_that_began_at_zero_hides_no_tiny_steps():
    rows = [inner(0, step, update_norm=1e-7, norm_before=[10, 1e-7 * step, 8]) for step in range(3)]
    assert one("LR002", make(*rows)).step == 0
    head = [
        inner(0, step, update_norm=[1e-7, 1e-3, 1e-7], norm_before=[10, 0, 8]) for step in (0, 1)
    ]
    assert silent("LR002", make(*head))  # a zero-initialised head that does learn


@pytest.mark.parametrize("how", [{"learning_rate": 1e-11}, {"learning_rate": -INF, "flags": 512.0}])
def test_steps_that_are_rounded_away(how):
    finding = one("LR002", make(*[row | how for row in tiny(0.0)]))

    assert place(finding) == ("ineffective-inner-step", Severity.WARNING, None, 0, 0)
    assert "every update is rounded away" in finding.message and "0.01 would move" in finding.fix
    assert silent("LR004", make(*[row | how for row in tiny(0.0)]))


def test_steps_of_rate_zero_are_not_rounded_away():
    for how in ({"learning_rate": 0.0}, {"learning_rate": -INF, "flags": float(FLAGS["zero"])}):
        rows = [row | how for row in tiny(0.0)]
        assert silent("LR002", make(*rows)) and silent("LR004", make(*rows))
        assert silent("FX006", make(*rows, dtype="bfloat16"))
    assert silent("LR002", make(*[row | {"learning_rate": 1e-11} for row in tiny([0, 0, 1e-2])]))
    frozen = [row | {"learning_rate": 1e-11, "gradient_norm": 0.0} for row in tiny(0.0)]
    assert silent("LR002", make(*frozen))


def at_rate(rate, update, tasks, first=0):
    rows = [inner(first + t, update_norm=update, learning_rate=rate) for t in range(tasks)]
    return make(*rows)


def test_a_rate_of_zero_in_every_task():
    finding = one("LR002", at_rate(0.0, 0.0, 5), at_rate(0.0, 0.0, 5, first=5))

    assert finding.severity is Severity.WARNING and finding.count == 10
    assert "learning rate is 0" in finding.message
    assert silent("LR002", at_rate(0.0, 0.0, 5))  # which may be a warm-up's beginning
    assert silent("LR002", at_rate(0.0, 0.0, 10), at_rate(0.1, 0.1, 1, first=10))


def test_a_task_that_moves_at_the_rate_of_those_before_it():
    few, many = at_rate(0.1, 1e-5, 3), at_rate(0.1, 1e-5, 9)

    assert one("LR002", few).count == 3
    assert silent("LR002", few, at_rate(0.1, 1e-2, 1, first=3))
    assert one("LR002", many, at_rate(0.1, 1e-2, 1, first=9)).count == 9  # said by then


def test_a_correction_that_cancels_the_gradient_is_no_small_rate():
    def tasks(rate, update, count, first=0):
        how = {"update_norm": update, "step_rate": rate, "learning_rate": -INF}
        return make(*[inner(first + t, **how) for t in range(count)])

    assert one("LR002", tasks(1e-5, 1e-5, 8), tasks(0.1, 0.1, 1, first=8)).count == 8
    assert silent("LR002", tasks(0.1, 0.1, 1), tasks(1e-6, 1e-5, 8, first=1))
    assert one("LR002", tasks(0.1, 0.1, 1), tasks(1e-5, 1e-5, 8, first=1)).count == 8


def climbing(rate, losses=(1.0, 1.5), declared=None):
    return [
        inner(0, step, step_rate=rate, loss=loss, gradient_norm=2.0, update_norm=abs(rate) * 2,
              learning_rate=rate if declared is None else declared)
        for step, loss in enumerate(losses)
    ]  # fmt: skip


#: A task that goes down, as a learned rate does before it turns.
DESCENDING = inner(9, step_rate=0.1, learning_rate=-INF)


@pytest.mark.parametrize("declared", [None, -INF])
def test_a_negative_rate(declared):
    finding = one("LR003", make(*climbing(-0.1, declared=declared), DESCENDING))

    assert place(finding) == ("negative-learned-lr", Severity.WARNING, "body.0", 0, 0)
    assert finding.evidence["learning_rate"] == pytest.approx(-0.1)


def test_an_objective_that_is_maximised_is_a_remark():
    """By hand, up from the first step on: a likelihood, or a sign that is wrong."""
    assert one("LR003", make(*climbing(-0.1, declared=-INF))).severity is Severity.INFO
    declared = one("LR003", make(*climbing(-0.1, declared=-0.1)))  # as an optimizer's rate
    assert declared.severity is Severity.WARNING


def test_a_rising_loss_with_a_positive_rate_or_a_negative_one_that_does_no_harm():
    assert silent("LR003", make(*climbing(0.1)))
    assert silent("LR003", make(*climbing(-0.1, losses=(1.5, 1.0))))
    assert silent("LR003", make(*climbing(-0.1, declared=0.1)))  # momentum climbs at times


NAMELESS = ("param[0] 8x20",)


def attacked(start, task):
    """Steps by hand up the loss, from ``start``."""
    return [
        row | {"task": float(task), "norm_before": start, "learning_rate": -INF}
        for row in climbing(-0.1)
    ]


def test_to_climb_on_an_input_is_a_remark():
    rows = [*attacked(2.0, 0), *attacked(3.0, 1), *attacked(2.5, 2)]
    seen = findings("LR003", make(*rows, parameters=NAMELESS))
    assert seen and {finding.severity for finding in seen} == {Severity.INFO}
    zeros = [*attacked(0.0, 0), *attacked(0.0, 1)]
    assert {f.severity for f in findings("LR003", make(*zeros, parameters=NAMELESS))} == {
        Severity.INFO
    }


def test_to_climb_on_a_base_without_a_name_is_not():
    down = DESCENDING | {"norm_before": 2.0}
    again = make(*attacked(2.0, 0), *attacked(2.0, 1), down, parameters=NAMELESS)
    assert findings("LR003", again)[-1].severity is Severity.WARNING
    moved = [
        make(outer(), parameters=NAMELESS),
        make(*attacked(2.0, 1), down, parameters=NAMELESS),
    ]
    assert findings("LR003", *moved)[-1].severity is Severity.WARNING
    known = make(*[row | {"learning_rate": -0.1} for row in attacked(2.0, 0)], parameters=NAMELESS)
    assert one("LR003", known).severity is Severity.WARNING


def test_what_else_is_in_an_update_shows_no_rate():
    """A correction (SCAFFOLD's) may point up the gradient; so may a rate for each weight."""
    rows = [row | {"update_norm": 0.5, "learning_rate": -INF} for row in climbing(-0.1)]
    averaged = outer(flags=float(FLAGS["incomplete"]), gradient_norm=MISSING, step_rate=NAN)

    assert one("LR003", make(*rows, DESCENDING)).severity is Severity.WARNING
    assert silent("LR003", make(*rows, DESCENDING, events=[start(in_place=True)]))
    assert silent("LR003", make(averaged, DESCENDING), make(*rows))


def test_to_look_uphill_before_a_step_is_a_remark():
    """SAM climbs at one line, and goes down from there at another."""
    up = [row | {"learning_rate": -INF} for row in climbing(-0.1)]
    down = DESCENDING | {"site": 1.0}

    assert one("LR003", make(down, *up)).severity is Severity.INFO
    assert one("LR003", make(down, DESCENDING, *up)).severity is Severity.WARNING


def test_what_a_net_makes_of_a_gradient_shows_no_rate():
    rows = [row | {"flags": float(FLAGS["transformed"])} for row in attacked(2.0, 0)]
    assert silent("LR003", make(*rows))


def test_an_update_that_is_thrown_away():
    finding = one("LR004", make(inner(), inner(step=1, update_norm=0.0)))

    assert place(finding) == ("no-parameter-change", Severity.ERROR, None, 0, 1)
    assert finding.evidence["gradient_norm"] == pytest.approx(3**0.5)


def test_a_step_by_hand_that_stands_still_at_a_line_that_never_moved_a_weight():
    still = inner(update_norm=0.0, learning_rate=-INF)
    assert "or the rate is so small" in one("LR004", make(still)).fix
    thrown = still | {"flags": float(FLAGS["discarded"])}
    assert "or the rate" not in one("LR004", make(thrown)).fix
    moving = inner(learning_rate=-INF)
    assert silent("LR004", make(moving, still | {"task": 1.0}))  # its rate went to zero, say
    assert silent("LR004", make(moving), make(still | {"task": 1.0}))
    assert one("LR004", make(moving, thrown | {"task": 1.0})).task == 1


def test_a_step_by_hand_on_an_accelerator_may_be_one_of_rate_zero():
    still = inner(update_norm=0.0, learning_rate=-INF)
    thrown = still | {"flags": float(FLAGS["discarded"])}

    assert silent("LR004", make(still, device="cuda:0"))
    assert one("LR004", make(thrown, device="cuda:0"))
    assert one("LR004", make(inner(update_norm=0.0, learning_rate=0.1), device="cuda:0"))


def test_an_update_with_an_infinite_gradient_is_not_thrown_away():
    block = make(inner(gradient_norm=[INF, 0, INF], update_norm=[INF, 0, NAN]))

    assert silent("LR004", block)


def test_parameters_that_have_no_reason_to_move():
    still = {"update_norm": 0.0}
    assert silent("LR004", make(inner(gradient_norm=0.0, **still)))
    assert silent("LR004", make(inner(gradient_norm=MISSING, **still)))
    assert silent("LR004", make(inner(learning_rate=0.0, **still)))
    assert silent("LR004", make(inner(gradient_norm=1e-9, **still)))  # below the resolution
    assert silent("LR004", make(inner(**still), dtype="bfloat16"))  # which is FX006's
    assert silent("LR004", make(inner(update_norm=[0, 0, 0.1])))
    assert silent("LR004", make(inner(), query()))


def test_a_gradient_taken_again_and_again():
    event = Event("repeated-gradient", 1, 0, 0.0, HERE, {"times": 3})

    finding = one("LR004", make(inner(), events=[event]))

    assert (finding.task, finding.evidence["times"], finding.marks[0].site) == (1, 3.0, HERE)
