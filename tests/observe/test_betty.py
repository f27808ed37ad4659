"""betty's engine, watched: unrolled steps of the lower problem between steps of the upper one."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

pytest.importorskip("betty")

from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem, IterativeProblem, Problem


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.full((8,), -3.0))

    def forward(self):
        return self.log.exp()


class Inner(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        self.losses = getattr(self, "losses", [])
        loss = F.mse_loss(self(x), y) + (self.outer() * self.module[2].weight.pow(2)).sum()
        self.losses.append(loss.item())
        return loss


class Outer(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.inner(x), y)


def build(kind="darts", unroll=3, iterations=2, roll_back=False, inner_class=Inner, **options):
    torch.manual_seed(1)
    net, penalty = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), Penalty()
    pairs = [(torch.randn(10, 4), torch.randn(10, 1)) for _ in range(2)]
    config = Config(type=kind, unroll_steps=unroll, **options)
    inner = inner_class(
        "inner", config, net, torch.optim.SGD(net.parameters(), lr=0.05), None, [pairs[0]]
    )
    outer = Outer(
        "outer",
        Config(),
        penalty,
        torch.optim.Adam(penalty.parameters(), lr=0.05),
        None,
        [pairs[1]],
    )
    count = iterations * unroll * options.get("gradient_accumulation", 1)
    engine = Engine(
        [outer, inner],
        EngineConfig(train_iters=count, roll_back=roll_back),
        {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    return engine, net, penalty, inner


def watched(**options):
    engine, _, _, inner = build(**options)
    with divergence_probe.attach() as probe:
        engine.run()
    assert probe.failure is None
    return probe.recording, inner


def _support_flags(recording):
    return [
        int(flags)
        for block in recording.blocks()
        for flags, phase in zip(block.scalars["flags"], block.scalars["phase"], strict=True)
        if phase == 0
    ]


def test_tasks_steps_queries_and_outer_steps():
    recording, _ = watched()
    steps = recording.steps()
    rows = steps[steps["parameter"].isin(["2.weight", "log"])]

    assert rows["phase"].tolist() == [*["support"] * 3, "query", "outer"] * 2
    assert recording.tasks()["steps"].tolist() == [3, 3]
    assert recording.tasks()["problem"].tolist() == ["inner", "inner"]
    assert rows[rows["phase"] == "support"]["learning_rate"].tolist() == pytest.approx([0.05] * 6)
    outer = [event for event in recording.events() if event.kind == "outer-step"]
    assert [event.data["optimizer"] for event in outer] == ["Adam", "Adam"]


def test_the_jacobians_forwards_are_nobodys_steps():
    recording, inner = watched(kind="darts")
    layers = recording.batch_norm()

    assert len(inner.losses) == 6 + 2 * 2  # the finite differences run the loss twice more
    assert layers["calls"].eq(1).all()
    assert len(layers.query("phase == 'support'")) == 6
    assert not [event for event in recording.events() if event.kind == "recomputed"]


@pytest.mark.parametrize("kind", ["darts", "neumann", "cg"])
def test_results_are_bit_identical(kind):
    results = []
    for on in (False, True):
        engine, net, penalty, inner = build(kind=kind)
        if on:
            with divergence_probe.attach():
                engine.run()
        else:
            engine.run()
        results.append(([*net.parameters(), *penalty.parameters()], inner.losses))

    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_a_step_taken_again_is_a_task_by_itself():
    recording, _ = watched(roll_back=True)

    assert recording.tasks()["steps"].tolist() == [3, 1, 3, 1]
    assert recording.tasks()["roll_back"].all()


def test_accumulated_gradients_are_one_step():
    recording, _ = watched(gradient_accumulation=2, unroll=2)
    support = recording.steps().query("phase == 'support' and parameter == '2.weight'")

    assert recording.tasks()["steps"].tolist() == [2, 2]
    assert (support["update_norm"] > 0).all()
    assert recording.batch_norm().query("phase == 'support'")["calls"].eq(2).all()


def test_clipped_gradients_are_noted():
    recording, _ = watched(gradient_clipping=1e-3)

    assert all(flags & 16 for flags in _support_flags(recording))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The .grad attribute:UserWarning")
def test_an_iterative_problems_steps_are_second_order():
    class Iterative(IterativeProblem):
        def training_step(self, batch):
            x, y = batch
            output = self.fmodule(self.params, self.buffers, x)
            return F.mse_loss(output, y) + (self.outer() * self.params[-2].pow(2)).sum()

    class Upper(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return F.mse_loss(self.inner.fmodule(self.inner.params, self.inner.buffers, x), y)

    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    penalty = Penalty()
    pair = (torch.randn(10, 4), torch.randn(10, 1))
    inner = Iterative(
        "inner", Config(first_order=True, unroll_steps=2, retain_graph=True), net,
        torch.optim.SGD(net.parameters(), lr=0.05), None, [pair],
    )  # fmt: skip
    outer = Upper(
        "outer", Config(first_order=False, retain_graph=True), penalty,
        torch.optim.Adam(penalty.parameters(), lr=0.05), None, [pair],
    )  # fmt: skip
    engine = Engine(
        [outer, inner], EngineConfig(train_iters=2),
        {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )  # fmt: skip
    with divergence_probe.attach() as probe:
        engine.run()
    assert probe.failure is None
    support = probe.recording.steps().query("phase == 'support' and parameter == '2.weight'")

    assert len(support) == 2
    assert support["norm_before"].iloc[1] == pytest.approx(support["norm_after"].iloc[0])
    assert set(probe.recording.batch_norm()["layer"]) == {"1"}
    assert all(flags & 1 for flags in _support_flags(probe.recording))


def test_training_without_levels_is_no_inner_loop():
    class Alone(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return F.mse_loss(self(x), y)

    net = nn.Linear(4, 1)
    alone = Alone(
        "alone", Config(), net, torch.optim.SGD(net.parameters(), lr=0.05), None,
        [(torch.randn(10, 4), torch.randn(10, 1))],
    )  # fmt: skip
    with divergence_probe.attach() as probe:
        Engine([alone], EngineConfig(train_iters=3), {"u2l": {}, "l2u": {}}).run()

    assert probe.recording.tasks().empty


def test_everything_is_restored():
    before = Problem.one_step_descent, Problem.backward, Problem.step_after_roll_back
    with divergence_probe.attach():
        assert Problem.backward is not before[1]

    assert (Problem.one_step_descent, Problem.backward, Problem.step_after_roll_back) == before
