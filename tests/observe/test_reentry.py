"""Code of the user's that comes back to us, copies itself, or leaves a call of ours half-way."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import divergence_probe
from divergence_probe.observe.pending_rows import BYTES_PER_BLOCK, PendingRows
from divergence_probe.observe.session import Session

TASKS, STEPS = 6, 3


def adapted(weights, x, y, loss_of=None, steps=STEPS):
    """Fast weights after some second-order steps."""
    loss_of = loss_of or (lambda w: F.mse_loss(F.linear(x, *w), y))
    for _ in range(steps):
        gradients = torch.autograd.grad(loss_of(weights), weights, create_graph=True)
        weights = [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]
    return weights


def train(net, outer, meanwhile=lambda task: None):
    """MAML of a linear net; ``meanwhile`` is called before each outer step."""
    for task in range(TASKS):
        x, y = torch.randn(4, 3), torch.randn(4, 1)
        fast = adapted(list(net.parameters()), x, y)
        outer.zero_grad()
        F.mse_loss(F.linear(x, *fast), y).backward()
        meanwhile(task)
        outer.step()


def counted(probe):
    summary = probe.diagnosis.summary
    return summary.tasks, summary.inner_steps, summary.outer_steps


@pytest.mark.parametrize("compiled", ["loss", "metric"])
def test_compiled_parts_of_a_loop_are_left_alone(compiled):
    def run():
        torch.manual_seed(0)
        net = nn.Linear(3, 1)
        outer, losses = torch.optim.SGD(net.parameters(), lr=0.1), []
        part = torch.compile(lambda x, y, w, b: F.mse_loss(F.linear(x, w, b), y), backend="eager")
        for _ in range(TASKS):
            x, y = torch.randn(4, 3), torch.randn(4, 1)
            eager = lambda w: F.mse_loss(F.linear(x, *w), y)  # noqa: B023, E731
            loss_of = (lambda w: part(x, y, *w)) if compiled == "loss" else eager  # noqa: B023
            fast = adapted(list(net.parameters()), x, y, loss_of)
            losses.append(part(x, y, *fast).item())
            outer.zero_grad()
            loss_of(fast).backward()
            outer.step()
        return losses

    bare = run()
    torch.compiler.reset()
    with divergence_probe.attach() as probe:
        watched = run()
    torch.compiler.reset()
    assert watched == bare and probe.failure is None
    assert counted(probe) == (TASKS, TASKS * STEPS, TASKS)


class Failing(torch.optim.SGD):
    """Fails in its step once."""

    fails = True

    def step(self, closure=None):
        if self.fails:
            self.fails = False
            raise ValueError("out of memory, say")
        return super().step(closure)


@pytest.mark.parametrize("where", ["closure", "step"])
def test_a_step_that_an_exception_ends_does_not_blind_the_probe(where):
    net, other = nn.Linear(3, 1), nn.Linear(2, 2)
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    side = (Failing if where == "step" else torch.optim.SGD)(other.parameters(), lr=0.1)

    def fails():
        raise ValueError("a bad batch")

    def step_of_another(task):
        if task == 2:
            with pytest.raises(ValueError, match=r"batch|memory"):
                side.step(fails if where == "closure" else None)

    with divergence_probe.attach() as probe:
        train(net, outer, step_of_another)
    assert counted(probe) == (TASKS, TASKS * STEPS, TASKS)
    assert any("exception ended a step" in reason for reason in probe.diagnosis.summary.incomplete)


def test_an_optimizer_whose_step_calls_another_one_is_one_step():
    class Wrapping(torch.optim.Optimizer):
        def __init__(self, base):
            self.base = base
            super().__init__(base.param_groups[0]["params"], {})

        def step(self, closure=None):
            return self.base.step(closure)

    net = nn.Linear(3, 1)
    outer = Wrapping(torch.optim.SGD(net.parameters(), lr=0.1))
    with divergence_probe.attach() as probe:
        train(net, outer)
    assert counted(probe) == (TASKS, TASKS * STEPS, TASKS)


def meta_batches(net, norm, outer, batches=5, tasks=3):
    """MAML with one outer gradient of the sum over a meta-batch; returns each query's loss."""
    queries = []
    for _ in range(batches):
        total = torch.zeros(())
        for _ in range(tasks):
            x, y = norm(torch.randn(8, 3)), torch.randn(8, 1)
            x = x.detach()
            loss_of = lambda w: F.mse_loss(F.linear(norm(x), *w), y)  # noqa: B023, E731
            fast = adapted(list(net.parameters()), x, y, loss_of, 4)
            query = loss_of(fast)
            queries.append(query.item())
            total = total + query
        outer.zero_grad()
        total.backward()
        outer.step()
    return queries


def test_the_queries_of_a_meta_batch_are_each_tasks_own():
    torch.manual_seed(0)
    net, norm = nn.Linear(3, 1), nn.BatchNorm1d(3, affine=False)
    with divergence_probe.attach() as probe:
        losses = meta_batches(net, norm, torch.optim.SGD(net.parameters(), lr=0.1))
    steps = probe.recording.steps()
    queries = steps[steps["phase"] == "query"].drop_duplicates("task").sort_values("task")
    # (of the very first meta-batch the sum is not known to be one)
    assert queries["loss"].tolist()[3:] == pytest.approx(losses[3:], rel=1e-6)
    calls = probe.recording.batch_norm()
    last = calls[(calls["task"] > 2) & (calls["phase"] == "support")]
    assert set(last.groupby("task").size()) == {4}


def test_tensors_of_a_class_of_the_users_are_noted_once():
    class Own(Tensor):
        pass

    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    outer = torch.optim.SGD(net.parameters(), lr=1e-2)
    with divergence_probe.attach(net) as probe:
        for _ in range(4):
            x, y = torch.randn(8, 4).as_subclass(Own), torch.randn(8, 3)
            fast = dict(net.named_parameters())
            for _ in range(STEPS):
                loss = F.mse_loss(torch.func.functional_call(net, fast, (x,)), y)
                gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                pairs = zip(fast.items(), gradients, strict=True)
                fast = {name: w - 0.1 * g for (name, w), g in pairs}
            outer.zero_grad()
            F.mse_loss(torch.func.functional_call(net, fast, (x,)), y).backward()
            outer.step()
    calls = probe.recording.batch_norm()
    support = calls[calls["phase"] == "support"]
    assert len(support) == 4 * STEPS


def test_what_is_kept_is_bounded_whatever_the_first_row_was_like(monkeypatch):
    kept = []
    part = PendingRows._part

    def measured(self, rows):
        sets = [values for row in rows for values in (row.before, row.after, row.gradients)]
        kept.append(sum(t.numel() * t.element_size() for v in sets for t in v if t is not None))
        part(self, rows)

    monkeypatch.setattr(PendingRows, "_part", measured)
    net, x = nn.Linear(200, 100), torch.randn(32, 200)

    def step(weights, x):
        gradients = torch.func.grad(lambda w: F.linear(x, *w).pow(2).mean())(weights)
        return [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]

    with divergence_probe.attach(net):
        step(list(net.parameters()), x)
        for _ in range(20):
            torch.func.vmap(step, in_dims=(None, 0))(list(net.parameters()), x)
    assert max(kept) < 2 * BYTES_PER_BLOCK


def test_an_error_of_ours_does_not_reach_a_run_where_warnings_are_errors(monkeypatch, capsys):
    def fails(self, *args, **kwargs):
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(Session, "step", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with divergence_probe.attach() as probe:
            adapted(list(nn.Linear(3, 1).parameters()), torch.randn(4, 3), torch.randn(4, 1))
    assert probe.failure is not None
    assert "switched itself off" in capsys.readouterr().err


def test_a_gradient_of_an_edge_is_none_of_a_parameter():
    weight = torch.randn(3, requires_grad=True)
    edge = get_gradient_edge(weight)
    with divergence_probe.attach() as probe:
        (gradient,) = torch.autograd.grad((weight**2).sum(), [edge])
    assert torch.equal(gradient, 2 * weight.detach()) and probe.failure is None


def test_a_chain_of_objects_is_copied_to_the_same_depth():
    class Link:
        def __init__(self, following):
            self.following = following

    def deepest():
        chain, depth = None, 0
        while True:
            chain, depth = Link(chain), depth + 1
            try:
                copy.deepcopy(chain)
            except RecursionError:
                return depth

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        bare = deepest()
        with divergence_probe.attach():
            watched = deepest()
    finally:
        sys.setrecursionlimit(limit)
    assert abs(watched - bare) <= 2


def test_models_are_copied_as_without_us():
    class Mixin:
        def __deepcopy__(self, memo):
            return "by the mixin"

    class Mixed(nn.Linear, Mixin):
        pass

    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    shared = [net, net]
    with divergence_probe.attach() as probe:
        made = copy.deepcopy(shared)
        assert copy.deepcopy(Mixed(2, 2)) == "by the mixin"
    assert made[0] is made[1] and made[0] is not net
    assert all(map(torch.equal, made[0].parameters(), net.parameters()))
    assert probe.failure is None and not hasattr(nn.Module, "__deepcopy__")


def test_a_step_in_another_ones_closure_is_part_of_that_step():
    net, other = nn.Linear(3, 1), nn.Linear(2, 2)
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    side, within = (torch.optim.SGD(other.parameters(), lr=0.1) for _ in range(2))

    def closure():
        within.step()
        return other(torch.ones(2)).sum()

    with divergence_probe.attach() as probe:
        train(net, outer, lambda task: side.step(closure))
    assert counted(probe) == (TASKS, TASKS * STEPS, TASKS)
    assert not probe.diagnosis.summary.incomplete
