"""learn2learn's LearnableOptimizer, watched: numbers, tasks, names, and what ends a task."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import divergence_probe
from divergence_probe.record.schema import FLAGS, SUPPORT

l2l = pytest.importorskip("learn2learn")

RATE = 0.1


@dataclass
class Notes:
    """What the loop knows itself: of each step its loss, and norms by parameter."""

    losses: list[float] = field(default_factory=list)
    before: list[list[float]] = field(default_factory=list)
    gradients: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)
    outer: list[list[float]] = field(default_factory=list)


class Loop:
    """A net, a learned optimizer of it, and what moves that."""

    def __init__(self, transform: Any = None, unused: bool = False) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)
        ).double()
        if unused:
            self.net.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
        transform = transform or l2l.optim.ModuleTransform(l2l.nn.Scale)
        self.inner = l2l.optim.LearnableOptimizer(self.net, transform, lr=RATE).double()
        self.outer = torch.optim.SGD(self.inner.parameters(), lr=0.1)
        self.start = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.notes = Notes()

    def backward(self, retain_graph: bool = False) -> None:
        """The loss of a new batch, and its gradients for net and optimizer."""
        x = torch.randn(8, 3, dtype=torch.float64)
        self.inner.zero_grad()
        loss = F.mse_loss(self.net(x), torch.sin(x[:, :2]))
        loss.backward(retain_graph=retain_graph)
        self.notes.losses.append(loss.item())

    def inner_step(self) -> None:
        self.notes.before.append(norms(self.net))
        self.notes.gradients.append([float(p.grad.norm()) for p in self.net.parameters()])
        self.inner.step()
        self.notes.after.append(norms(self.net))

    def outer_step(self) -> None:
        given = [p.grad for p in self.inner.parameters() if p.grad is not None]
        if given:
            self.notes.outer.append([float(gradient.norm()) for gradient in given])
        self.outer.step()
        self.outer.zero_grad()

    def outer_step_by_hand(self) -> None:
        given = [p.grad for p in self.inner.parameters() if p.grad is not None]
        if given:
            self.notes.outer.append([float(gradient.norm()) for gradient in given])
            for parameter, gradient in zip(self.inner.parameters(), given, strict=True):
                parameter.data -= 0.1 * gradient
        self.outer.zero_grad()


def norms(net: nn.Module) -> list[float]:
    return [float(parameter.detach().norm()) for parameter in net.parameters()]


def outer_first(loop: Loop, step: Callable[[], None], steps: int = 5) -> None:
    """As in the library's own example."""
    for _ in range(steps):
        loop.backward()
        step()
        loop.inner_step()


def inner_first(loop: Loop, step: Callable[[], None], steps: int = 5) -> None:
    for _ in range(steps):
        loop.backward()
        loop.inner_step()
        step()


def every_third(loop: Loop, step: Callable[[], None], steps: int = 7) -> None:
    """The optimizer's gradients add up until it is stepped."""
    for number in range(1, steps + 1):
        loop.backward()
        if number % 3 == 0:
            step()
        loop.inner_step()


ORDERS = {
    # runs of inner steps that lie between two outer ones; before the first there is no gradient
    "outer first": (outer_first, [1, 1, 1, 1, 1]),
    "inner first": (inner_first, [2, 1, 1, 1]),
    "every third": (every_third, [2, 3, 2]),
}


def support(probe: divergence_probe.Probe) -> pd.DataFrame:
    steps = probe.recording.steps()
    return steps[steps.phase == "support"]


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_steps_are_recorded_as_the_loop_takes_them(order: str, by_hand: bool) -> None:
    loop = Loop()
    run, tasks = ORDERS[order]
    with divergence_probe.attach() as probe:
        run(loop, loop.outer_step_by_hand if by_hand else loop.outer_step)

    assert probe.failure is None and not probe.diagnosis.summary.incomplete
    assert probe.recording.tasks()["steps"].tolist() == tasks
    names = [name for name, _ in loop.net.named_parameters()]
    rows, notes = support(probe), loop.notes
    taken = [group for _, group in rows.groupby(["task", "step"])]
    assert len(taken) == sum(tasks)
    for number, step in enumerate(taken):
        assert step.parameter.tolist() == names
        assert step.loss.tolist() == pytest.approx([notes.losses[number]] * len(names), rel=1e-6)
        for column, own in (
            ("norm_before", notes.before),
            ("gradient_norm", notes.gradients),
            ("norm_after", notes.after),
        ):
            assert step[column].tolist() == pytest.approx(own[number], rel=1e-6), column
        assert step.learning_rate.tolist() == [RATE] * len(names)


@pytest.mark.parametrize("order", ORDERS)
def test_outer_steps_move_the_transform(order: str) -> None:
    loop = Loop()
    with divergence_probe.attach() as probe:
        ORDERS[order][0](loop, loop.outer_step)

    steps = probe.recording.steps()
    outer = steps[steps.phase == "outer"]
    names = [name for name, _ in loop.inner.named_parameters()]
    assert list(dict.fromkeys(outer.parameter)) == names
    expected = [norm for step in loop.notes.outer for norm in step]
    assert outer.gradient_norm.tolist() == pytest.approx(expected, rel=1e-6)
    assert probe.diagnosis.summary.outer_steps == len(loop.notes.outer)
    assert not probe.diagnosis.findings and probe.diagnosis.verdict == "healthy"


def test_the_next_loss_is_the_query_of_a_task_that_the_outer_step_ends() -> None:
    loop = Loop()
    with divergence_probe.attach() as probe:
        outer_first(loop, loop.outer_step, steps=4)

    steps = probe.recording.steps()
    own = next(name for name, _ in loop.net.named_parameters())
    theirs = next(name for name, _ in loop.inner.named_parameters())
    rows = steps[
        (steps.parameter == own) | ((steps.phase == "outer") & (steps.parameter == theirs))
    ]
    assert rows.phase.tolist() == [*["support", "query", "outer"] * 3, "support"]
    queries = rows[rows.phase == "query"]
    assert queries.loss.tolist() == pytest.approx(loop.notes.losses[1:], rel=1e-6)
    layers = probe.recording.batch_norm()
    assert layers.layer.tolist() == ["1"] * 4  # each forward once, under the user's name
    assert layers.phase.tolist() == ["support"] * 4


def test_steps_are_differentiable_where_the_transform_is_learned() -> None:
    loop = Loop()
    with divergence_probe.attach() as probe:
        outer_first(loop, loop.outer_step, steps=2)
        with torch.no_grad():
            loop.inner.step()  # the last gradients once more, and no graph

    flags = [
        int(flag) & FLAGS["second_order"]
        for block in probe.recording.blocks()
        for flag, phase in zip(block.scalars["flags"], block.scalars["phase"], strict=True)
        if phase == SUPPORT
    ]
    assert flags == [FLAGS["second_order"]] * 2


@pytest.mark.parametrize("how", ["load_state_dict", "data", "copy_", "module"])
def test_a_task_ends_where_the_weights_are_put_back(how: str) -> None:
    loop = Loop()
    with divergence_probe.attach() as probe:
        for _ in range(3):
            for _ in range(2):
                loop.backward()
                loop.inner_step()
            restore(loop, how)

    tasks = probe.recording.tasks()
    assert tasks["steps"].tolist() == [2, 2, 2]
    rows = support(probe)
    first = rows[(rows.step == 0) & (rows.parameter == "0.weight")]
    start = float(loop.start["0.weight"].norm())
    assert first.norm_before.tolist() == pytest.approx([start] * 3, rel=1e-6)


def restore(loop: Loop, how: str) -> None:
    if how == "load_state_dict":
        loop.net.load_state_dict(loop.start)
        return
    for name, parameter in list(loop.net.named_parameters()):
        if how == "data":
            parameter.data = loop.start[name].clone()
        elif how == "copy_":
            with torch.no_grad():
                parameter.copy_(loop.start[name])
        else:
            path, _, last = name.rpartition(".")
            part = loop.net.get_submodule(path)
            part._parameters[last] = nn.Parameter(loop.start[name].clone())


def test_without_an_outer_optimizer_all_is_one_task() -> None:
    loop = Loop(l2l.optim.ModuleTransform(nn.Linear))
    with divergence_probe.attach() as probe:
        outer_first(loop, lambda: None)

    assert probe.recording.tasks()["steps"].tolist() == [5]
    assert probe.recording.tasks()["optimizer"].tolist() == ["LearnableOptimizer"]


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    loop = Loop(unused=True)
    with divergence_probe.attach() as probe:
        for _ in range(3):
            loop.backward()
            loop.outer.step()
            loop.inner.step()

    rows = support(probe)
    unused = rows[rows.parameter == "unused"]
    assert unused.norm_before.tolist() == unused.norm_after.tolist() and len(unused) == 3
    assert probe.recording.tasks()["steps"].tolist() == [1, 1, 1]


def test_a_step_without_any_gradient_is_none() -> None:
    loop = Loop()
    with divergence_probe.attach() as probe:
        loop.inner.step()
        loop.backward()
        loop.inner_step()
        loop.inner.step()

    assert probe.recording.tasks()["steps"].tolist() == [1]


def test_two_backwards_add_up_to_one_step() -> None:
    loop = Loop()
    with divergence_probe.attach() as probe:
        for _ in range(2):
            loop.backward(retain_graph=True)  # both go through the step before
            x = torch.randn(8, 3, dtype=torch.float64)
            more = F.mse_loss(loop.net(x), torch.cos(x[:, :2]))
            more.backward()
            loop.notes.losses[-1] += more.item()
            loop.outer_step()
            loop.inner_step()

    rows = support(probe)
    rows = rows[rows.parameter == "0.weight"]
    own = [gradients[0] for gradients in loop.notes.gradients]
    assert rows.gradient_norm.tolist() == pytest.approx(own, rel=1e-6)
    assert rows.loss.tolist() == pytest.approx(loop.notes.losses, rel=1e-6)


def test_a_transform_that_gets_no_gradient_is_said_once_it_could_have_one() -> None:
    """The weights are detached after every step: the outer step has nothing to go by."""
    loop = Loop()
    with divergence_probe.attach() as probe:
        for _ in range(4):
            loop.backward()
            loop.inner.step()
            l2l.detach_module(loop.net, keep_requires_grad=True)
            loop.outer.step()

    assert "MG001" in {finding.rule for finding in probe.diagnosis.findings}


@pytest.mark.parametrize("order", ORDERS)
def test_results_are_bit_identical_and_warnings_are_no_others(order: str) -> None:
    def results(loop: Loop) -> tuple[Notes, list[Tensor], Tensor, list[str]]:
        with warnings.catch_warnings(record=True) as met:
            warnings.simplefilter("always")
            ORDERS[order][0](loop, loop.outer_step)
        weights = [p.detach() for p in (*loop.net.parameters(), *loop.inner.parameters())]
        return loop.notes, weights, torch.rand(3), [str(warning.message) for warning in met]

    plain = results(Loop())
    with divergence_probe.attach() as probe:
        probed = results(Loop())

    assert probe.failure is None
    assert plain[0] == probed[0] and plain[3] == probed[3]
    assert torch.equal(plain[2], probed[2])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], probed[1], strict=True))


def test_hypergradient_descent_with_evaluations_between_is_healthy() -> None:
    """As the library's own example: a rate an element, dropout, accuracy after every epoch."""

    class Rates(nn.Module):
        def __init__(self, parameter: Tensor) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.full_like(parameter, 0.5))

        def forward(self, gradient: Tensor) -> Tensor:
            return self.rate * gradient

    loop = Loop(Rates)
    loop.net.insert(2, nn.Dropout(0.2))
    with divergence_probe.attach() as probe:
        for _ in range(3):
            loop.net.train()
            outer_first(loop, loop.outer_step, steps=6)
            loop.net.eval()
            with torch.no_grad():
                F.mse_loss(loop.net(torch.randn(64, 3).double()), torch.zeros(64, 2).double())

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps, summary.outer_steps) == (18, 18, 17)
    assert not probe.diagnosis.findings and probe.failure is None


def test_nothing_is_kept_alive() -> None:
    with divergence_probe.attach():
        loop = Loop()
        outer_first(loop, loop.outer_step, steps=3)
        weights = list(loop.net.parameters())
        kept: list[Any] = [weakref.ref(weights[0]), weakref.ref(loop.net), weakref.ref(loop.inner)]
        del loop, weights
        gc.collect()

        assert [reference() for reference in kept] == [None] * 3


def test_everything_is_restored() -> None:
    step = l2l.optim.LearnableOptimizer.step
    with divergence_probe.attach():
        assert l2l.optim.LearnableOptimizer.step is not step

    assert l2l.optim.LearnableOptimizer.step is step
