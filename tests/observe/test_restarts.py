"""Weights that are reset in place begin a new task, whatever they were made by."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

import divergence_probe

RATE, STEPS, TASKS = 0.1, 4, 4


@pytest.fixture(autouse=True)
def _alone() -> None:
    gc.collect()
    torch.manual_seed(0)


def loss(weights: Sequence[Tensor], hyper: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Logistic regression with a penalty of each weight's own strength."""
    penalty = sum((h.exp() * w.pow(2)).sum() for h, w in zip(hyper, weights, strict=True))
    return F.binary_cross_entropy_with_logits(F.linear(x, *weights), y) + 0.01 * penalty


def transformed(fast: list[Tensor], hyper: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    for _ in range(STEPS):
        grads = grad(lambda w: loss(w, hyper, x, y))(fast)
        fast = [w.detach().add(g.detach(), alpha=-RATE) for w, g in zip(fast, grads, strict=True)]
    return fast


def new_leaves(fast: list[Tensor], hyper: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    fast = [w.requires_grad_() for w in fast]
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss(fast, hyper, x, y), fast)
        fast = [(w - RATE * g).detach().requires_grad_() for w, g in zip(fast, grads, strict=True)]
    return fast


def unrolled(fast: list[Tensor], hyper: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    fast = [w.detach_().requires_grad_() for w in fast]
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss(fast, hyper, x, y), fast, create_graph=True)
        fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
    return fast


def in_place(fast: list[Tensor], hyper: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    fast = [w.requires_grad_() for w in fast]
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss(fast, hyper, x, y), fast)
        for weight, gradient in zip(fast, grads, strict=True):
            weight.data -= RATE * gradient
    return fast


def by_optimizer(fast: list[Tensor], hyper: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    fast = [w.requires_grad_() for w in fast]
    optimizer = torch.optim.SGD(fast, lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(fast, hyper, x, y).backward(inputs=fast)
        optimizer.step()
    return fast


def zeroed(weights: list[Tensor]) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.zero_()


def zeroed_as_data(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.data.zero_()


def filled(weights: list[Tensor]) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.fill_(0)


def initialised(weights: list[Tensor]) -> None:
    for weight in weights:
        nn.init.zeros_(weight)


def hypergradient(
    fast: list[Tensor], hyper: list[Tensor], x: Tensor, y: Tensor
) -> Sequence[Tensor]:
    """Through one more step from the weights the inner loop came to."""
    at = [w.detach().clone().requires_grad_() for w in fast]
    query = torch.autograd.grad(F.binary_cross_entropy_with_logits(F.linear(x, *at), y), at)
    grads = torch.autograd.grad(loss(at, hyper, x, y), at, create_graph=True)
    return torch.autograd.grad(grads, hyper, [-RATE * v for v in query])


Inner = Callable[[list[Tensor], list[Tensor], Tensor, Tensor], list[Tensor]]
Reset = Callable[[list[Tensor]], None]
WAYS = (transformed, new_leaves, unrolled, in_place, by_optimizer)


def search(inner: Inner, reset: Reset, *, queried: bool = True) -> divergence_probe.Probe:
    """Penalties of each weight are learned; they are a module of the weights' own structure."""
    model = nn.Linear(5, 1)
    zeroed(list(model.parameters()))
    hyper = copy.deepcopy(model)
    fast: list[Tensor] = list(model.parameters())
    if inner not in (in_place, by_optimizer):
        fast = [p.detach().clone() for p in fast]
    outer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    with divergence_probe.attach() as probe:
        for _ in range(TASKS):
            x, y = torch.randn(16, 5), torch.rand(16, 1).round()
            fast = inner(fast, list(hyper.parameters()), x, y)
            if queried:
                grads = hypergradient(fast, list(hyper.parameters()), x, y)
                for parameter, gradient in zip(hyper.parameters(), grads, strict=True):
                    parameter.grad = gradient
                outer.step()
            reset(fast)
    return probe


def counted(probe: divergence_probe.Probe) -> tuple[int, list[int]]:
    assert probe.failure is None
    return probe.diagnosis.summary.tasks, probe.recording.tasks()["steps"].tolist()


@pytest.mark.parametrize("reset", [zeroed, zeroed_as_data, filled, initialised])
@pytest.mark.parametrize("inner", WAYS)
def test_weights_set_to_zero_begin_a_task(inner: Inner, reset: Reset) -> None:
    probe = search(inner, reset)

    assert counted(probe) == (TASKS, [STEPS] * TASKS)
    assert not probe.diagnosis.findings
    steps = probe.recording.steps()
    assert steps.parameter.nunique() == 2
    begun = steps[(steps.phase == "support") & (steps.step == 0)]
    assert (begun.norm_before == 0).all()


@pytest.mark.parametrize("inner", WAYS)
def test_what_the_last_step_made_is_incomplete_where_only_its_zeros_were_seen(inner: Inner) -> None:
    """No gradient was taken between the last update and the reset."""
    probe = search(inner, zeroed, queried=False)

    assert counted(probe) == (TASKS, [STEPS] * TASKS)
    assert not probe.diagnosis.findings
    steps = probe.recording.steps()
    ended = steps[(steps.phase == "support") & (steps.step == STEPS - 1)]
    assert not (ended.norm_after == 0).any()


@pytest.mark.parametrize(("rows", "copied"), [(100, True), (12_000, False)])
def test_large_weights_overwritten_before_they_were_measured(rows: int, copied: bool) -> None:
    """Very large tensors are kept by reference: their value is gone with the reset."""
    fast = [torch.ones(rows, 100, requires_grad=True)]
    with divergence_probe.attach() as probe:
        for _ in range(3):
            for _ in range(STEPS):
                grads = torch.autograd.grad(fast[0].pow(2).mean(), fast)
                fast = [(fast[0] - RATE * grads[0]).detach().requires_grad_()]
            torch.autograd.grad(fast[0].sum(), fast)
            with torch.no_grad():
                fast[0].fill_(1)

    assert counted(probe) == (3, [STEPS] * 3)
    steps = probe.recording.steps()
    ended = steps[(steps.phase == "support") & (steps.step == STEPS - 1)]
    if copied:
        assert (ended.norm_after < ended.norm_before).all()
    else:
        assert ended.norm_after.isna().all()


def test_a_run_that_begins_before_the_first_reset_counts() -> None:
    """The first task begins with the values the model was made with."""
    model = nn.Linear(5, 1)
    fast: list[Tensor] = list(model.parameters())
    with divergence_probe.attach() as probe:
        for _ in range(TASKS):
            fast = by_optimizer(
                fast, list(model.parameters()), torch.randn(16, 5), torch.ones(16, 1)
            )
            zeroed(fast)

    assert counted(probe) == (TASKS, [STEPS] * TASKS)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("inner", ["leaves", "graph"])
def test_weights_projected_in_place_go_on_with_their_task(inner: str, every: int) -> None:
    """The healthy look-alike: new weights, bounded in place after each step or after some."""
    base = nn.Linear(5, 1)
    with divergence_probe.attach() as probe:
        for _ in range(TASKS):
            x, y = torch.randn(16, 5), torch.rand(16, 1).round()
            fast = list(base.parameters())
            for step in range(2 * STEPS):
                value = F.binary_cross_entropy_with_logits(F.linear(x, *fast), y)
                grads = torch.autograd.grad(value, fast, create_graph=inner == "graph")
                fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
                if inner == "leaves":
                    fast = [w.detach().requires_grad_() for w in fast]
                if step % every == 0:
                    with torch.no_grad():
                        for weight in fast:
                            weight.clamp_(-0.3, 0.3)

    assert counted(probe) == (TASKS, [2 * STEPS] * TASKS)


def test_gradients_looked_at_along_the_way_begin_no_task() -> None:
    """The healthy look-alike of a query before a reset: nothing is written."""
    base = nn.Linear(5, 1)
    with divergence_probe.attach() as probe:
        for _ in range(TASKS):
            x, y = torch.randn(16, 5), torch.rand(16, 1).round()
            fast: list[Tensor] = [p.detach().clone().requires_grad_() for p in base.parameters()]
            for _ in range(STEPS):
                torch.autograd.grad(F.mse_loss(F.linear(x, *fast), y), fast)  # to print its norm
                value = F.binary_cross_entropy_with_logits(F.linear(x, *fast), y)
                grads = torch.autograd.grad(value, fast)
                fast = [
                    (w - RATE * g).detach().requires_grad_()
                    for w, g in zip(fast, grads, strict=True)
                ]

    assert counted(probe) == (TASKS, [STEPS] * TASKS)
