"""Loops that are known by heart: what is asked less often must not be seen less well."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import divergence_probe
from divergence_probe.observe.following import Follower
from divergence_probe.observe.known_loops import KnownLoops
from tests import coverage_matrix
from tests.coverage_loops.notes import RATE, Net, Notes, batch, forward

TASKS, STEPS = 14, 5
Fast = list[Tensor]
Update = Callable[[int, int, Fast, Sequence[Tensor]], Fast]


def plain(task: int, step: int, fast: Fast, gradients: Sequence[Tensor]) -> Fast:
    return [w - RATE * g for w, g in zip(fast, gradients, strict=True)]


def clipped_when_large(task: int, step: int, fast: Fast, gradients: Sequence[Tensor]) -> Fast:
    """Another operation in the last step of some later tasks, as a clip that becomes active."""
    if task in (9, 10) and step == STEPS - 1:
        gradients = [g.clamp(-1e-3, 1e-3) for g in gradients]
    return plain(task, step, fast, gradients)


def half_of_it_otherwise(task: int, step: int, fast: Fast, gradients: Sequence[Tensor]) -> Fast:
    """The first weights are updated as always, the others in another way."""
    updated = plain(task, step, fast, gradients)
    if task == 9:
        others = zip(fast[2:], gradients[2:], strict=True)
        updated[2:] = [torch.add(w, g, alpha=-RATE) for w, g in others]
    return updated


def without_graph_once(task: int, step: int, fast: Fast, gradients: Sequence[Tensor]) -> Fast:
    if task == 9:
        with torch.no_grad():
            updated = plain(task, step, fast, gradients)
        return [w.requires_grad_() for w in updated]
    return plain(task, step, fast, gradients)


def loop(
    notes: Notes, update: Update = plain, steps: Callable[[int], int] = lambda task: STEPS
) -> list[Tensor]:
    """MAML over a list; returns its losses."""
    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for task in range(TASKS):
        notes.task()
        outer.zero_grad()
        x, y = batch()
        fast: Fast = list(net.parameters())
        for step in range(steps(task)):
            loss = F.mse_loss(forward(fast, x), y)
            before = notes.values(fast)
            gradients = torch.autograd.grad(loss, fast, create_graph=True)
            fast = update(task, step, fast, gradients)
            notes.step(loss, before, fast)
            losses.append(loss.detach())
        query = F.mse_loss(forward(fast, x), y)
        query.backward()
        losses.append(query.detach())
        outer.step()
    return losses


def watched(run: Callable[[Notes], object]) -> tuple[Notes, divergence_probe.Probe, object]:
    torch.manual_seed(0)
    notes = Notes()
    with divergence_probe.attach() as probe:
        result = run(notes)
    assert probe.failure is None
    return notes, probe, result


@pytest.mark.parametrize(
    "update", [plain, clipped_when_large, half_of_it_otherwise, without_graph_once]
)
def test_every_step_is_exact_whatever_comes_instead_of_the_known_update(update: Update) -> None:
    notes, probe, _ = watched(lambda notes: loop(notes, update))

    result = coverage_matrix.compare(notes, probe.recording)

    assert (result.verdict, result.detail) == ("exact", "")
    assert not probe.diagnosis.summary.incomplete


@pytest.mark.parametrize("other", [STEPS + 2, STEPS + 1])
def test_a_task_longer_than_those_before_is_exact(other: int) -> None:
    notes, probe, _ = watched(
        lambda notes: loop(notes, steps=lambda task: other if task == 9 else STEPS)
    )

    assert coverage_matrix.compare(notes, probe.recording).verdict == "exact"


def test_a_task_shorter_than_those_before_owns_up_to_its_last_step() -> None:
    notes, probe, _ = watched(lambda notes: loop(notes, steps=lambda task: 3 if task == 9 else 5))

    assert coverage_matrix.compare(notes, probe.recording).verdict == "incomplete"
    assert "1 of 68 inner steps" in " ".join(probe.diagnosis.summary.incomplete)


def test_numbers_and_random_draws_are_the_same() -> None:
    torch.manual_seed(0)
    bare, draws = loop(Notes()), torch.get_rng_state()

    _, _, seen = watched(loop)

    assert isinstance(seen, list) and all(map(torch.equal, bare, seen))
    assert torch.equal(draws, torch.get_rng_state())


def test_a_known_loop_is_not_followed_through_its_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []
    expected: list[int] = []
    tasks: list[int] = []
    look, went_on = Follower._look, KnownLoops.went_on

    def counting(self: Follower, *args: object) -> None:
        looks.append(len(tasks))
        look(self, *args)  # type: ignore[arg-type]

    def counted(self: KnownLoops, *args: object) -> object:
        expected.append(len(tasks))
        return went_on(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Follower, "_look", counting)
    monkeypatch.setattr(KnownLoops, "went_on", counted)

    def steps(task: int) -> int:
        tasks.append(task)
        return STEPS

    watched(lambda notes: loop(notes, steps=steps))

    assert max(looks) < 10  # and from then on never
    assert [expected.count(task) for task in range(11, TASKS)] == [STEPS - 1] * 3


def test_an_error_in_the_middle_of_a_known_task_comes_after_all_its_steps() -> None:
    def failing(task: int, step: int, fast: Fast, gradients: Sequence[Tensor]) -> Fast:
        updated = plain(task, step, fast, gradients)
        if (task, step) == (9, 2):
            updated[1] = updated[1].detach()  # the next gradient cannot be taken of it
        return updated

    torch.manual_seed(0)
    notes = Notes()
    with (
        pytest.raises(RuntimeError, match="does not require grad"),
        divergence_probe.attach() as probe,
    ):
        loop(notes, failing)

    steps = probe.recording.steps()
    last = steps[(steps["phase"] == "support") & (steps["task"] == 9)]
    assert sorted(set(last["step"])) == [0, 1, 2]
    assert last["norm_after"].notna().all()
    assert probe.diagnosis.exception is not None and probe.diagnosis.exception.inner_loop


@pytest.mark.parametrize("functional", [False, True])
def test_a_loss_that_turns_bad_in_a_known_task_is_traced_to_its_operation(functional: bool) -> None:
    def bad(x: Tensor, task: int, step: int) -> Tensor:
        return torch.log(x.abs() - x.abs()) if (task, step) == (9, 3) else x

    net = Net()
    with divergence_probe.attach() as probe:
        for task in range(TASKS):
            x, y = batch()
            fast: Fast = list(net.parameters())
            for step in range(STEPS):

                def loss_of(weights: Fast, task: int = task, step: int = step) -> Tensor:
                    return F.mse_loss(bad(forward(weights, x), task, step), y)  # noqa: B023

                if functional:
                    gradients = torch.func.grad(loss_of)(fast)
                else:
                    gradients = torch.autograd.grad(loss_of(fast), fast)
                fast = [w - RATE * g for w, g in zip(fast, gradients, strict=True)]
            with torch.no_grad():
                for parameter, adapted in zip(net.parameters(), fast, strict=True):
                    parameter += 1e-3 * (adapted - parameter).nan_to_num(0.0)

    findings = [f for f in probe.diagnosis.findings if f.cause == "singular-forward"]
    assert findings, [f.message for f in probe.diagnosis.findings]
    assert (findings[0].task, findings[0].step) == (9, 3)


def test_what_was_heard_of_an_update_that_never_ends_is_let_go() -> None:
    net = Net()
    graphs: list[weakref.ref[Tensor]] = []
    with divergence_probe.attach() as probe:
        for task in range(TASKS):
            x, y = batch()
            fast: Fast = list(net.parameters())
            for _ in range(STEPS):
                loss = F.mse_loss(forward(fast, x), y)
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                if task == TASKS - 1 and len(graphs) == STEPS - 1:
                    half = fast[0] - RATE * gradients[0]
                    graphs.append(weakref.ref(half))
                    del half
                    break
                fast = plain(task, 0, fast, gradients)
                graphs = [*graphs, weakref.ref(fast[0])] if task == TASKS - 1 else []
        del fast, gradients, loss
        other = nn.Linear(2, 1)
        torch.autograd.grad(other(torch.ones(2)).sum(), list(other.parameters()))
        gc.collect()
        assert len(graphs) == STEPS and not any(graph() is not None for graph in graphs)
    assert probe.failure is None


def test_under_a_mode_of_the_user_s_nothing_is_taken_for_granted() -> None:
    class Counting(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += 1
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    with Counting() as bare:
        loop(Notes())
    torch.manual_seed(0)
    notes = Notes()
    with divergence_probe.attach() as probe, Counting() as seen:
        loop(notes)

    assert seen.calls == bare.calls  # none of ours
    assert probe.failure is None
    assert coverage_matrix.compare(notes, probe.recording).verdict != "WRONG"


@pytest.mark.parametrize("shape", ["expand", "repeat", "view"])
def test_a_context_used_in_another_shape_only_is_adapted(shape: str) -> None:
    """One step on a vector that is joined with every sample, as context adaptation does it."""
    net = nn.Linear(3, 1)
    outer = torch.optim.Adam(net.parameters(), 1e-3)

    def predicted(x: Tensor, context: Tensor) -> Tensor:
        rows = {
            "expand": lambda: context.expand(len(x), -1),
            "repeat": lambda: context.repeat(len(x), 1),
            "view": lambda: context.view(1, 2).expand(len(x), 2),
        }[shape]()
        return net(torch.cat((x, rows), 1))

    with divergence_probe.attach() as probe:
        for _ in range(4):
            total = torch.zeros(())
            for _ in range(3):
                x, y = torch.randn(10, 1), torch.randn(10, 1)
                context = torch.zeros(2, requires_grad=True)
                loss = F.mse_loss(predicted(x, context), y)
                (gradient,) = torch.autograd.grad(loss, context, create_graph=True)
                total = total + F.mse_loss(predicted(x, context - gradient), y)
            outer.zero_grad()
            total.backward()
            outer.step()

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (12, 12)
    assert probe.diagnosis.verdict == "healthy"


def test_updates_that_are_thrown_away_begin_no_tasks():
    torch.manual_seed(0)
    weights = [torch.randn(3, 2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    outer, x, y = torch.optim.SGD(weights, lr=0.01), torch.randn(8, 2), torch.randn(8, 3)
    with divergence_probe.attach() as probe:
        for _ in range(9):
            for _ in range(4):  # each starts from the base: what the one before made is gone
                loss = F.mse_loss(F.linear(x, *weights), y)
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                fast = [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]
            outer.zero_grad()
            F.mse_loss(F.linear(x, *fast), y).backward()
            outer.step()
    summary = probe.diagnosis.summary
    # (the first is kept while the next one is made, as if it had its turn later)
    assert (summary.tasks, summary.inner_steps, summary.outer_steps) == (9, 35, 9)
    assert "no-parameter-change" in {finding.cause for finding in probe.diagnosis.findings}


@pytest.mark.parametrize("what", ["another model", "a shorter task"])
def test_what_has_the_shapes_of_the_next_step_is_not_taken_for_it(what):
    torch.manual_seed(0)
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    truth = {}  # by loss: norms of the weight before and after each step

    def taken(weights, x, y):
        loss = F.mse_loss(F.linear(x, *weights), y)
        return loss.item(), torch.autograd.grad(loss, weights, create_graph=True)

    with divergence_probe.attach() as probe:
        for task in range(TASKS):
            x, y, odd = torch.randn(8, 3), torch.randn(8, 2), task == 9
            fast = [w * 0.9 for w in net.parameters()]  # no leaves: as every later step's are
            for step in range(2 if odd and what == "a shorter task" else STEPS):
                loss, gradients = taken(fast, x, y)
                if odd and step == 1 and what == "another model":
                    taken([w * 1.5 for w in other.parameters()], x, y)
                new = [w - RATE * g for w, g in zip(fast, gradients, strict=True)]
                truth[loss] = fast[0].norm().item(), new[0].norm().item()
                fast = new
    steps = probe.recording.steps()
    rows = steps[steps["phase"] == "support"].drop_duplicates(["task", "step"])  # the weight's
    seen = rows[rows["loss"].isin(list(truth)) & (rows["norm_after"] >= 0)]
    assert len(seen) > len(truth) - 6
    for row in seen.itertuples():
        assert (row.norm_before, row.norm_after) == pytest.approx(truth[row.loss], rel=1e-6)
    assert probe.diagnosis.summary.incomplete
