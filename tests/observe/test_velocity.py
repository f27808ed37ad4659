"""The cosine of a first update with the task before's velocity, against plain arithmetic."""

import math

import pytest
import torch

from divergence_probe.observe.capture import Forwards, Row
from divergence_probe.observe.velocity import carried_velocities
from divergence_probe.record.schema import SUPPORT

Tensors = list[torch.Tensor]


def _row(before: Tensors, after: Tensors, gradients: Tensors, preceding: Row | None = None) -> Row:
    row = Row(0, 0, SUPPORT, 0, -1, 0.0, before, after, gradients, Forwards())
    row.preceding = preceding
    return row


def _expected(row: Row) -> float:
    """The definition: both updates with the gradient projected out."""
    assert row.preceding is not None
    update, velocity = (
        torch.cat([(a - b).flatten() for b, a in zip(r.before, r.after, strict=True)]).double()  # type: ignore[operator]
        for r in (row, row.preceding)
    )
    gradient = torch.cat([g.flatten() for g in row.gradients if g is not None]).double()
    along = gradient / gradient.norm()
    across, other = (v - (v @ along) * along for v in (update, velocity))
    return float(across @ other / (across.norm() * other.norm()))


def _tensors(*sizes: tuple[int, ...]) -> Tensors:
    return [torch.randn(size) for size in sizes]


@pytest.mark.parametrize("sizes", [((3, 4), (5,)), ((200, 100), (7,))])
def test_it_is_the_cosine_of_what_the_gradient_does_not_explain(
    sizes: tuple[tuple[int, ...], ...],
) -> None:
    torch.manual_seed(0)
    rows = []
    for _ in range(40):
        preceding = _row(_tensors(*sizes), _tensors(*sizes), _tensors(*sizes))
        rows.append(_row(_tensors(*sizes), _tensors(*sizes), _tensors(*sizes), preceding))
    rows.insert(3, _row(_tensors(*sizes), _tensors(*sizes), _tensors(*sizes)))
    found = carried_velocities(rows)
    assert math.isnan(found[3])
    for number, row in zip(found, rows, strict=True):
        if row.preceding is not None:
            assert number == pytest.approx(_expected(row), abs=1e-5)


def test_carried_momentum_is_one_and_plain_descent_is_nothing() -> None:
    torch.manual_seed(0)
    before, gradient = _tensors((3, 4), (5,)), _tensors((3, 4), (5,))
    velocity = _tensors((3, 4), (5,))
    last = _row([b - v for b, v in zip(before, velocity, strict=True)], before, gradient)
    descent = [b - 0.1 * g for b, g in zip(before, gradient, strict=True)]
    momentum = [d + 0.9 * v for d, v in zip(descent, velocity, strict=True)]
    plain, carried = carried_velocities(
        [_row(before, descent, gradient, last), _row(before, momentum, gradient, last)]
    )
    assert math.isnan(plain)
    assert carried == pytest.approx(1, abs=1e-4)
