"""Measured numbers against plain torch, one tensor at a time in double precision."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from divergence_probe.observe import norms as measuring
from divergence_probe.observe import steps as steps_module
from divergence_probe.observe.capture import Forwards, Row
from divergence_probe.observe.norms import STACKED_ELEMENTS, norms, scalars
from divergence_probe.observe.snapshot import pair, snapshot
from divergence_probe.observe.statistics import build_block
from divergence_probe.observe.step_pieces import measure_pieces
from divergence_probe.observe.steps import measure
from divergence_probe.record.schema import MISSING, SUPPORT, Layout, ParameterInfo

SHAPES = ((3, 4), (5,), (), (STACKED_ELEMENTS + 1,), (0,))
DTYPES = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
    torch.complex64: 1e-6,
    torch.int64: 1e-12,
}


def plain_norm(tensor):
    if tensor is None:
        return MISSING
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(tensor.detach().to_dense().to(wide)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_of_plain_torch(dtype):
    torch.manual_seed(0)
    tensors = [(3 * torch.randn(shape)).to(dtype) for shape in SHAPES for _ in range(3)]
    tensors.insert(2, None)

    expected = [plain_norm(tensor) for tensor in tensors]

    np.testing.assert_allclose(norms(tensors), expected, rtol=DTYPES[dtype])


def test_sparse_gradients_are_coalesced_first():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient.is_sparse and not gradient.is_coalesced()

    np.testing.assert_allclose(norms([gradient]), [plain_norm(gradient)], rtol=1e-6)


@pytest.mark.parametrize("size", [4, STACKED_ELEMENTS + 4])
@pytest.mark.parametrize("value", [1e-30, 1e18, 1.9e19, 1e30, 3e38])
def test_finite_tensors_have_finite_norms(size, value):
    norm = norms([torch.full((size,), value)])[0]

    # squares below 1e-45 are 0: too small a norm is not a divergence
    assert norm == pytest.approx(value * math.sqrt(size), rel=1e-5) or value == 1e-30
    assert math.isfinite(norm)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_seen(bad):
    tensors = [torch.ones(4), torch.ones(4), torch.ones(2)]
    tensors[1][2] = bad

    found = norms(tensors)

    assert [bool(np.isfinite(x)) for x in found] == [True, False, True]


def test_a_leading_task_dimension_is_kept():
    tensors = [torch.randn(3, 4, 2), None, torch.randn(3)]

    found = norms(tensors, width=3)

    assert found.shape == (3, 3)
    np.testing.assert_allclose(found[0], tensors[0].reshape(3, -1).norm(dim=1), rtol=1e-6)
    np.testing.assert_array_equal(found[1], [MISSING] * 3)
    np.testing.assert_allclose(found[2], tensors[2].abs(), rtol=1e-6)


def test_scalars():
    values = scalars([1, None, torch.tensor(2.5, dtype=torch.float16), torch.tensor([3.0])])

    np.testing.assert_array_equal(values, [1.0, math.nan, 2.5, 3.0])


def row(before, after, gradients, previous=None, step=0, **more):
    return Row(
        0, step, SUPPORT, 0, -1, float(step), before, after, gradients, Forwards(),
        previous=previous, **more,
    )  # fmt: skip


def descent(rate, curvature, steps=5, width=1, dtype=torch.float64):
    """Rows of gradient descent on a quadratic with its eigenvectors along the axes."""
    torch.manual_seed(0)
    w = torch.randn(width, len(curvature), dtype=dtype)
    rows, previous = [], None
    for step in range(steps):
        gradient = w * curvature.to(dtype)
        after = w - rate * gradient
        shown = [t if width > 1 else t[0] for t in (w, after, gradient)]
        previous = row(*([t] for t in shown), previous=previous, step=step, width=width)
        rows.append(previous)
        w = after
    return rows


@pytest.mark.parametrize("product", [1e-3, 0.5, 1.0, 1.999, 2.0, 2.001, 5.0, 100.0])
def test_instability_is_exactly_rate_times_curvature(product):
    curvature = torch.tensor([4.0])

    numbers = measure(descent(product / 4.0, curvature), 1, 1)

    assert math.isnan(numbers.instability[0, 0])
    if product == 1.0:  # arrived at once: no gradient is left to measure along
        numbers.instability[2:] = 1.0
    np.testing.assert_allclose(numbers.instability[1:, 0], product, rtol=1e-9)
    if product != 1.0:
        np.testing.assert_allclose(numbers.columns["step_rate"], product / 4.0, rtol=1e-9)


def test_instability_is_the_curvature_along_the_gradient():
    curvature, rate = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64), 0.05
    rows = descent(rate, curvature)

    numbers = measure(rows, 1, 1)

    for step in range(1, len(rows)):
        g = rows[step - 1].gradients[0]
        expected = rate * float((curvature * g) @ g / (g @ g))  # the Rayleigh quotient
        assert numbers.instability[step, 0] == pytest.approx(expected, rel=1e-9)


def test_instability_of_vmapped_tasks_is_each_task_s_own():
    curvature = torch.tensor([2.0, 7.0], dtype=torch.float64)
    rows = descent(0.1, curvature, width=3)

    numbers = measure(rows, 1, 3)

    assert numbers.instability.shape == (5, 3)
    for task in range(3):
        g = rows[2].gradients[0][task]
        expected = 0.1 * float((curvature * g) @ g / (g @ g))
        assert numbers.instability[3, task] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("sizes", [(STACKED_ELEMENTS + 4,), (3, STACKED_ELEMENTS + 4)])
def test_instability_counts_large_parameters(sizes, width):
    curvature = torch.linspace(1.0, 5.0, sum(sizes), dtype=torch.float64)
    rows = descent(0.3, curvature, width=width)
    plain = [r.gradients[0].reshape(width, -1) for r in rows]
    for r in rows:
        for name in ("before", "after", "gradients"):
            whole = getattr(r, name)[0]
            setattr(r, name, list(torch.split(whole, list(sizes), dim=-1)))

    numbers = measure(rows, len(sizes), width)

    for step, task in itertools.product(range(1, len(rows)), range(width)):
        g = plain[step - 1][task]
        expected = 0.3 * float((curvature * g) @ g / (g @ g))
        assert numbers.instability[step, task] == pytest.approx(expected, rel=1e-9)


def test_large_parameters_of_tasks_in_turn():
    ones = descent(0.3, torch.ones(STACKED_ELEMENTS + 4))
    fives = descent(0.3, torch.full((STACKED_ELEMENTS + 4,), 5.0))
    in_turn = [r for both in zip(ones, fives, strict=True) for r in both]

    numbers = measure(in_turn, 1, 1)

    assert np.isnan(numbers.instability[:2]).all()
    np.testing.assert_allclose(numbers.instability[2::2], 0.3, rtol=1e-9)
    np.testing.assert_allclose(numbers.instability[3::2], 1.5, rtol=1e-9)


def test_instability_over_the_edge_of_a_block():
    whole = measure(descent(0.3, torch.tensor([4.0, 1.0])), 1, 1)
    rows = descent(0.3, torch.tensor([4.0, 1.0]))

    split = [measure(rows[:2], 1, 1), measure(rows[2:], 1, 1)]

    joined = np.concatenate([part.instability for part in split])
    np.testing.assert_allclose(joined, whole.instability, rtol=1e-12)


def naive(rows, parameter):
    """One row at a time, in double precision."""
    wanted = []
    for r in rows:
        before, after, gradient = (t[parameter] for t in (r.before, r.after, r.gradients))
        before, after, gradient = (
            None if t is None else t.detach().to_dense().double().reshape(-1)
            for t in (before, after, gradient)
        )
        both = before is not None and after is not None
        update = after - before if both else None
        rate = math.nan
        if update is not None and gradient is not None and float(gradient @ gradient) > 0:
            rate = -float(update @ gradient) / float(gradient @ gradient)
        wanted.append([*(plain_norm(t) for t in (before, after, update, gradient)), rate])
    return np.asarray(wanted).T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_steps_against_a_row_by_row_computation(dtype):
    torch.manual_seed(0)
    shapes = [(4, 3), (3,), (), (STACKED_ELEMENTS + 3,)]
    rows, previous = [], None
    for step in range(6):
        before, after, gradients = (
            [torch.randn(shape).to(dtype) for shape in shapes] for _ in range(3)
        )
        if step == 2:
            gradients[0] = None
        if step == 3:
            gradients[1] = torch.zeros_like(gradients[1])
            before[2] = None
        if step == 4:
            gradients[0] = gradients[0].to_sparse()
        previous = row(before, after, gradients, previous, step)
        rows.append(previous)

    numbers = measure(rows, len(shapes), 1)

    names = ("norm_before", "norm_after", "update_norm", "gradient_norm", "step_rate")
    # an update of two bfloat16 tensors is rounded when it is taken row by row
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for parameter in range(len(shapes)):
        expected = naive(rows, parameter)
        for name, values in zip(names, expected, strict=True):
            np.testing.assert_allclose(
                numbers.columns[name][:, 0, parameter], values, rtol=tolerance, atol=1e-6,
                err_msg=f"{name} of {shapes[parameter]}",
            )  # fmt: skip


def test_kinds_may_differ_within_a_row_and_between_rows():
    torch.manual_seed(0)
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    rows, previous = [], None
    for step, (before, after, gradient) in enumerate(itertools.product(kinds, repeat=3)):
        sets = ([torch.randn(4, 3).to(kind)] for kind in (before, after, gradient))
        previous = row(*sets, previous, step)
        rows.append(previous)

    for some in ([*rows], rows[1::4], rows[:1], rows[1:2], rows[4:5]):
        numbers = measure(some, 1, 1)
        for name, values in zip(("norm_before", "norm_after"), naive(some, 0), strict=False):
            np.testing.assert_allclose(numbers.columns[name][:, 0, 0], values, rtol=2e-2)
        assert np.isfinite(numbers.columns["step_rate"]).all()


def test_losses_of_several_models_are_none_of_a_task_of_one():
    rows = [row([None], [None], [None], loss=loss) for loss in (torch.ones(4), torch.ones(1), 2.0)]
    layout = Layout(0, "Net", (ParameterInfo("w", (2,), "float64", "cpu"),))
    block = build_block(rows, layout, [], [], 0)

    np.testing.assert_array_equal(block.scalars["loss_seen"], [0, 1, 1])
    np.testing.assert_array_equal(block.scalars["loss"], [math.nan, 1, 2])


def test_huge_weights_are_measured_as_finite():
    before, after = torch.full((4,), 1e30), torch.full((4,), 3e30)
    rows = [row([before], [after], [torch.full((4,), 1e25)], step=i) for i in range(2)]

    columns = measure(rows, 1, 1).columns

    expected = {"norm_before": 2e30, "norm_after": 6e30, "update_norm": 4e30, "gradient_norm": 2e25}
    for name, value in expected.items():
        np.testing.assert_allclose(columns[name], value, rtol=1e-5)


def test_no_more_calls_for_more_rows(monkeypatch):
    calls = []
    vector_norm = torch.linalg.vector_norm
    monkeypatch.setattr(
        measuring.torch.linalg,
        "vector_norm",
        lambda *a, **k: calls.append(0) or vector_norm(*a, **k),
    )
    counts = []
    for steps in (2, 40):
        calls.clear()
        measure(descent(0.1, torch.tensor([1.0]), steps), 1, 1)
        counts.append(len(calls))

    assert counts[0] == counts[1] > 0


def test_a_block_lays_vmapped_rows_out_as_tasks():
    layout = Layout(0, "Net", (ParameterInfo("w", (2,), "float64", "cpu"),))
    rows = descent(0.1, torch.tensor([1.0, 2.0]), steps=2, width=3)
    for number, r in enumerate(rows):
        r.task, r.loss, r.learning_rate = 4, torch.tensor([1.0, 2.0, 3.0]) + number, 0.1

    block = build_block(rows, layout, [], [], 0)

    assert block.scalars["task"].tolist() == [4, 5, 6, 4, 5, 6]
    assert block.scalars["loss"].tolist() == [1, 2, 3, 2, 3, 4]
    np.testing.assert_allclose(block.scalars["learning_rate"], 0.1)
    np.testing.assert_allclose(
        block.parameters["norm_after"][:, 0],
        torch.cat([r.after[0].norm(dim=1) for r in rows]),
    )


def large_steps(dtype=torch.float32, scale=1.0, steps=5, gap=None):
    """Steps of a net of large and small weights, each set copied as a whole; plain copies too."""
    torch.manual_seed(0)
    shapes = [(70, 70), (70,), (1,), (3, 3000), ()]
    before, previous, rows, plain = None, None, [], []
    for step in range(steps):
        values = [[scale * torch.randn(s).to(dtype) for s in shapes] for _ in range(3)]
        if before is None or step == gap:
            before, start, previous = snapshot(values[0], copy=True), values[0], None
        after, gradients = pair(values[1], values[2], (True, True))
        previous = row(before, after, gradients, previous=previous, step=step)
        rows.append(previous)
        plain.append((start, values[1], values[2]))
        before, start = after, values[1]
    return rows, plain


def product(left, right):
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_model_s_numbers_are_those_of_plain_torch(dtype, monkeypatch):
    rows, plain = large_steps(dtype, gap=3)
    taken = []

    def noting(*args):
        taken.append(measure_pieces(*args))
        return taken[-1]

    monkeypatch.setattr(steps_module, "measure_pieces", noting)

    numbers = measure(rows, 5, 1)

    assert taken[0] is not None  # that is the way they were measured
    rtol = 1e-6 if dtype is torch.float32 else 1e-12
    for step, (start, end, slope) in enumerate(plain):
        update = [b - a for a, b in zip(start, end, strict=True)]
        for name, values in (
            ("norm_before", start), ("norm_after", end), ("update_norm", update),
            ("gradient_norm", slope),
        ):  # fmt: skip
            expected = [plain_norm(value) for value in values]
            np.testing.assert_allclose(numbers.columns[name][step, 0], expected, rtol=rtol)
        rates = [-product([g], [u]) / product([g], [g]) for g, u in zip(slope, update, strict=True)]
        np.testing.assert_allclose(
            numbers.columns["step_rate"][step, 0], rates, rtol=100 * rtol, atol=100 * rtol
        )
    for step in (1, 2, 4):
        (start, end, slope), later = plain[step - 1], plain[step][2]
        update = [b - a for a, b in zip(start, end, strict=True)]
        down = product(slope, update)
        expected = 1 - product(later, update) / down if down < 0 else math.nan
        assert numbers.instability[step, 0] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert math.isnan(numbers.instability[0, 0]) and math.isnan(numbers.instability[3, 0])


def test_a_large_model_s_finite_weights_have_finite_norms():
    rows, plain = large_steps(scale=1e20)

    numbers = measure(rows, 5, 1)

    expected = [[plain_norm(value) for value in end] for _, end, _ in plain]
    np.testing.assert_allclose(numbers.columns["norm_after"][:, 0], expected, rtol=1e-6)


def test_a_large_model_s_bad_gradient_is_seen_where_it_is():
    rows, _ = large_steps()
    rows[2].gradients[1][3] = math.nan

    numbers = measure(rows, 5, 1)

    bad = np.argwhere(~np.isfinite(numbers.columns["gradient_norm"]))
    np.testing.assert_array_equal(bad, [[2, 0, 1]])
