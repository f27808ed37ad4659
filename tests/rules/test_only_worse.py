"""LR005: adaptation that only makes the support loss worse."""

import pytest

from divergence_probe.rules.finding import Severity

from .blocks import end, inner, make, one, place, silent


def task(number, losses, rate=1.0, gradient=4.0):
    """A task of these losses, whose first step promises a decrease of rate x gradient^2."""
    return [
        inner(number, step, loss=loss, step_rate=rate, gradient_norm=[gradient, 0, 0],
              learning_rate=rate)
        for step, loss in enumerate(losses)
    ]  # fmt: skip


def tasks(*many):
    rows = [row for number, one in enumerate(many) for row in task(number, **one)]
    return make(*rows, events=[end(number) for number in range(len(many))])


WORSE = {"losses": (1.0, 3.0, 4.0, 5.0)}


def test_every_task_only_gets_worse():
    finding = one("LR005", tasks(WORSE, WORSE, WORSE, WORSE))

    assert finding.count == 4
    assert place(finding) == ("inner-lr-too-high", Severity.WARNING, None, 0, 0)
    assert finding.evidence["step_size_x_curvature"] == pytest.approx(8.0)
    assert "1, and 5 after 3 steps" in finding.message and "lr = 0.25" in finding.fix


@pytest.mark.parametrize(
    "other",
    [
        {"losses": (1.0, 3.0, 1.9, 3.0)},  # it comes back
        {"losses": (1.0, 3.0, 4.0, 5.0), "gradient": 1.0},  # no step that is too long
        {"losses": (-1.0, 3.0, 4.0, 5.0)},  # a loss that no value bounds
    ],
)
def test_one_task_that_is_not_like_that(other):
    assert silent("LR005", tasks(WORSE, WORSE, other, WORSE, WORSE))


def test_a_few_tasks_or_a_few_steps_tell_nothing():
    assert silent("LR005", tasks(WORSE, WORSE))
    assert silent("LR005", tasks(*[{"losses": (1.0, 3.0, 4.0)}] * 5))
