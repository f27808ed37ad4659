"""Copies of several tensors at once: their values, and what they must not change."""

import pytest
import torch

from divergence_probe.observe.snapshot import Snapshot, pair, snapshot
from divergence_probe.observe.step_vectors import Vectors

SHAPES = [(3, 4), (5,), ()]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def test_a_pair_is_what_two_snapshots_are() -> None:
    weights, gradients = tensors(*SHAPES), tensors(*SHAPES)

    first, second = pair(weights, gradients, (True, True))

    for values, copies in ((weights, first), (gradients, second)):
        assert isinstance(copies, Snapshot) and len(copies) == 3
        assert all(c is not None and torch.equal(c, v) for c, v in zip(copies, values, strict=True))
        assert torch.equal(copies.vector, torch.cat([v.reshape(-1) for v in values]))
    again, _ = pair(gradients, weights, (False, False), like=first)
    assert torch.equal(again[0], gradients[0])


def test_a_pair_survives_what_the_user_does_next() -> None:
    weights, gradients = tensors(*SHAPES), tensors(*SHAPES)
    kept = [w.clone() for w in weights]

    first, _ = pair(weights, gradients, (True, True))
    for weight in weights:
        weight.add_(1.0)

    assert all(c is not None and torch.equal(c, k) for c, k in zip(first, kept, strict=True))


@pytest.mark.parametrize("large", [False, True])
def test_what_is_missing_stays_missing(large: bool) -> None:
    size = 200 if large else 2
    weights, gradients = tensors((size, size), (size,)), [None, torch.randn(size)]

    first, second = pair(weights, gradients, (False, False), like=snapshot(weights, copy=False))

    assert second[0] is None and torch.equal(second[1], gradients[1])  # type: ignore[arg-type]
    assert torch.equal(first[0], weights[0])  # type: ignore[arg-type]


def test_each_of_two_kinds_keeps_its_own() -> None:
    weights = tensors((4,), (4,))
    gradients = tensors((4,), (4,), dtype=torch.float16)

    first, second = pair(weights, gradients, (True, True))

    assert [t.dtype for t in first if t is not None] == [torch.float32] * 2
    assert [t.dtype for t in second if t is not None] == [torch.float16] * 2


def test_sets_that_share_a_copy_lie_side_by_side() -> None:
    weights, gradients = tensors((4,), (4,)), tensors((4,), (4,))
    first, second = pair(weights, gradients, (True, True))
    alone = snapshot(tensors((4,), (4,)), copy=True)
    vectors = Vectors(8)

    places = [vectors.position(values) for values in (second, first, alone, first)]
    matrix = vectors.stacked()

    assert places == [1, 0, 2, 0] and matrix is not None
    assert torch.equal(matrix[1], torch.cat(gradients))
    assert isinstance(alone, Snapshot) and torch.equal(matrix[2], alone.vector)
