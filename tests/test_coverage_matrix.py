"""Every way of writing an inner loop that the coverage matrix knows is recorded as it happened."""

import pytest

from tests import coverage_matrix
from tests.coverage_loops.notes import Net, Notes, functional_loop
from tests.coverage_loops.with_libraries import LIBRARIES

CELLS = {str(cell): cell for cell in coverage_matrix.cells()}

# Recordings of these may have a gap, which they must then own up to.
MAY_BE_INCOMPLETE = (
    "by hand: through numpy",
    "by hand: tasks of unequal length",
    "torch.func: `vmap` over tasks, gradient inside",
)


def assert_exact(cell, may_be_incomplete):
    """A cell is recorded exactly; those whose names begin so may be incomplete, and never wrong."""
    result = coverage_matrix.run(cell)

    assert result.verdict != "WRONG", result.detail
    if not str(cell).startswith(may_be_incomplete):
        assert result.verdict == "exact", result.detail


@pytest.mark.parametrize("name", CELLS)
def test_recorded_as_it_happened(name):
    assert_exact(CELLS[name], MAY_BE_INCOMPLETE)


def test_every_installed_library_is_there():
    seen = {cell.library for cell in CELLS.values()}

    assert {"by hand", "torch.func", "torch.optim", "higher", "torchopt", "betty"} <= seen
    assert seen <= {"by hand", "torch.func", "torch.optim", *LIBRARIES}


def test_a_wrong_norm_is_called_wrong():
    def loop(notes: Notes) -> None:
        def update(loss, fast, state, second):
            import torch

            gradients = torch.autograd.grad(loss, fast)
            return [p - 0.05 * g for p, g in zip(fast, gradients, strict=True)]

        functional_loop(notes, update, False)
        notes.tasks[1][2].after["second.bias"] *= 1 + 1e-5

    cell = coverage_matrix.Cell("by hand", "a lie", "first", "by hand", loop)

    assert coverage_matrix.run(cell).verdict == "WRONG"


def test_a_missing_task_is_called_wrong():
    cell = coverage_matrix.Cell(
        "by hand", "nothing", "first", "by hand", lambda notes: notes.task()
    )

    assert coverage_matrix.run(cell).verdict == "WRONG"


def test_the_page_counts_and_lists_every_cell():
    cell = next(iter(CELLS.values()))
    text = coverage_matrix.page({cell: coverage_matrix.Result("incomplete", "a gap")})

    assert "1 incomplete" in text
    assert f"| {cell.library} | {cell.style} |" in text
    assert "incomplete: a gap" in text


def test_the_net_is_the_same_as_functions():
    import torch

    from tests.coverage_loops.notes import batch, forward

    net = Net()
    x, _ = batch()

    assert torch.equal(net(x), forward(list(net.parameters()), x))
