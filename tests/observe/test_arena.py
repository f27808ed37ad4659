"""Memory of the probe's own: never handed out twice at a time, and used again."""

import gc
import threading

import pytest
import torch

from divergence_probe.observe.arena import _ARENA, empty
from divergence_probe.observe.snapshot import MOST_TOGETHER, Snapshot, pair, snapshot

LARGE = MOST_TOGETHER + 5


def test_pieces_are_their_own():
    pieces = [empty(size, torch.float32).fill_(number) for number, size in enumerate([1, 7, 1000])]
    pieces.append(empty(2**21, torch.float64).fill_(3))

    assert [set(piece.tolist()) for piece in pieces] == [{0.0}, {1.0}, {2.0}, {3.0}]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)


def test_memory_is_used_again_once_nothing_lies_on_it():
    def mapped():
        return sum(len(chunk.pages) for chunk in _ARENA._chunks)

    kept = empty(10, torch.float32).fill_(7)
    for _ in range(3):
        pieces = [empty(100_000, torch.float32) for _ in range(20)]
        views = [piece[:3] for piece in pieces]
        del pieces
    most = mapped()
    del views
    for _ in range(500):
        empty(100_000, torch.float32).fill_(1)

    assert mapped() == most
    assert set(kept.tolist()) == {7.0}


def test_a_view_keeps_its_memory():
    view = empty(1000, torch.float32).fill_(5)[10:20]
    gc.collect()
    for _ in range(1000):
        empty(1000, torch.float32).fill_(1)

    assert set(view.tolist()) == {5.0}


def test_tensors_may_die_in_another_thread():
    left = []

    def own():  # a thread has chunks of its own
        pieces = [empty(50_000, torch.float32) for _ in range(20)]
        other = threading.Thread(target=pieces.clear)
        other.start()
        other.join()
        left.extend(len(chunk.pieces) for chunk in _ARENA._chunks)

    thread = threading.Thread(target=own)
    thread.start()
    thread.join()

    assert len(left) == 4 and not any(left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_sets_are_copied_together(dtype):
    tensors = [
        torch.randn(LARGE).to(dtype),
        torch.randn(3, 4).to(dtype).t(),
        torch.ones((), dtype=dtype),
    ]
    before = [tensor.clone() for tensor in tensors]

    values, others = pair(tensors, tensors, (False, False))
    for tensor in tensors:
        tensor.zero_()

    for found in (values, others):
        assert isinstance(found, Snapshot)
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
        assert not any(part.requires_grad for part in found)


def test_the_next_steps_of_a_large_set_are_copied_there_too():
    def pieces():
        return sum(len(chunk.pieces) for chunk in _ARENA._chunks)

    tensors = [torch.randn(LARGE), torch.randn(3)]
    before = snapshot(tensors, copy=False)
    count = pieces()
    values, others = pair(tensors, tensors, (False, False), like=before)

    assert pieces() > count
    assert isinstance(values, Snapshot) and isinstance(others, Snapshot)


def test_sets_that_cannot_be_copied_together():
    large = torch.randn(LARGE)
    for tensors in (
        [large, None],
        [large, torch.ones(2, dtype=torch.float64)],
        [large, torch.eye(3).to_sparse()],
        [],
    ):
        found = snapshot(tensors, copy=True)
        assert not isinstance(found, Snapshot) and len(found) == len(tensors)
