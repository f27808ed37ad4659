"""Outer steps by hand on weights that no inner loop adapts: who looks ahead at another's step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import divergence_probe

ITERATIONS = 3


@pytest.fixture(autouse=True)
def _alone() -> None:
    gc.collect()
    torch.manual_seed(0)


def clone_then_detach(weights: Tensor) -> Tensor:
    return weights.clone().detach().requires_grad_()


def detach_then_clone(weights: Tensor) -> Tensor:
    return weights.detach().clone().requires_grad_()


def deep_copy(weights: Tensor) -> Tensor:
    return copy.deepcopy(weights)


def attached_clone(weights: Tensor) -> Tensor:
    return weights.clone()


def itself(weights: Tensor) -> Tensor:
    return weights


def as_data(weights: Tensor, gradient: Tensor) -> Tensor:
    weights.data -= 0.1 * gradient
    return weights


def in_place(weights: Tensor, gradient: Tensor) -> Tensor:
    with torch.no_grad():
        weights -= 0.1 * gradient
    return weights


def copied_in(weights: Tensor, gradient: Tensor) -> Tensor:
    with torch.no_grad():
        weights.copy_(weights - 0.1 * gradient)
    return weights


def new_leaf(weights: Tensor, gradient: Tensor) -> Tensor:
    return (weights - 0.1 * gradient).detach().requires_grad_()


def play(
    copied: Callable[[Tensor], Tensor],
    update: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    at_once: bool,
) -> divergence_probe.Probe:
    """LOLA: each agent takes its gradient through what the other would do."""
    agents = [torch.randn(5, requires_grad=True) for _ in range(2)]
    payoff = torch.randn(5, 5)

    def loss(own: Tensor, other: Tensor) -> Tensor:
        return -torch.sigmoid(own) @ payoff @ torch.sigmoid(other)

    def looked_ahead(own: Tensor, other: Tensor) -> Tensor:
        fast = copied(other)
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(loss(fast, own), fast, create_graph=True)
            fast = fast - 0.3 * gradient
        return torch.autograd.grad(loss(own, fast), own)[0]

    with divergence_probe.attach() as probe:
        for _ in range(ITERATIONS):
            if at_once:
                grads = [looked_ahead(*agents), looked_ahead(*agents[::-1])]
                agents = [update(a, g) for a, g in zip(agents, grads, strict=True)]
            else:
                agents[0] = update(agents[0], looked_ahead(*agents))
                agents[1] = update(agents[1], looked_ahead(*agents[::-1]))
    return probe


def counted(probe: divergence_probe.Probe) -> tuple[int, int, int]:
    assert probe.failure is None
    summary = probe.diagnosis.summary
    return summary.tasks, summary.inner_steps, summary.outer_steps


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("update", [as_data, in_place, copied_in, new_leaf])
@pytest.mark.parametrize(
    "copied", [clone_then_detach, detach_then_clone, deep_copy, attached_clone, itself]
)
def test_agents_that_step_by_hand_take_outer_steps(
    copied: Callable[[Tensor], Tensor],
    update: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    at_once: bool,
) -> None:
    probe = play(copied, update, steps, at_once)
    tasks, inner, outer = counted(probe)

    assert (tasks, inner) == (2 * ITERATIONS, 2 * ITERATIONS * steps)
    assert not probe.diagnosis.findings
    # (an agent replaced after the other's gradient was taken leaves nothing that shows it)
    if update is not new_leaf:
        assert outer == 2 * ITERATIONS


def test_an_outer_step_by_hand_has_its_own_gradient() -> None:
    probe = play(detach_then_clone, in_place, 2, at_once=True)
    steps = probe.recording.steps()
    outer = steps[steps.phase == "outer"]

    assert outer.gradient_norm.notna().all()
    assert (0.1 * outer.gradient_norm).to_list() == pytest.approx(
        outer.update_norm.to_list(), rel=1e-4
    )


def test_a_second_order_loop_over_other_weights_stays_an_inner_loop() -> None:
    """The look-alike: a body is adapted through the adapted head, and both are differentiated."""
    torch.manual_seed(0)
    body, head = torch.randn(4, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    outer = torch.optim.SGD([body, head], lr=0.01)
    with divergence_probe.attach() as probe:
        for _ in range(ITERATIONS):
            x, y = torch.randn(8, 3), torch.randn(8, 2)
            fast = {"head": head, "body": body}
            for name in ("head", "body"):
                for _ in range(2):
                    hidden = torch.tanh(F.linear(x, fast["body"]))
                    value = F.mse_loss(F.linear(hidden, fast["head"]), y)
                    (gradient,) = torch.autograd.grad(value, fast[name], create_graph=True)
                    fast[name] = fast[name] - 0.1 * gradient
            outer.zero_grad()
            hidden = torch.tanh(F.linear(x, fast["body"]))
            F.mse_loss(F.linear(hidden, fast["head"]), y).backward()
            outer.step()

    assert counted(probe) == (2 * ITERATIONS, 4 * ITERATIONS, ITERATIONS)


def test_weights_trained_in_turn_are_no_nested_loop() -> None:
    """The look-alike of two agents: neither is adapted for the other, both are just trained."""
    nets = [nn.Linear(3, 4), nn.Linear(4, 2)]
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    with divergence_probe.attach() as probe:
        for _ in range(8):
            for net in nets:
                value = F.mse_loss(nets[1](torch.tanh(nets[0](x))), y)
                grads = torch.autograd.grad(value, list(net.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(net.parameters(), grads, strict=True):
                        parameter -= 0.1 * gradient

    assert counted(probe) == (0, 0, 0)


def test_of_two_gradients_neither_is_the_outer_steps() -> None:
    """Two look-aheads are averaged, and the step is taken after yet another gradient."""
    own, other = (torch.randn(5, requires_grad=True) for _ in range(2))
    payoff, apart = torch.randn(5, 5), torch.ones(3, requires_grad=True)

    def loss(one: Tensor, two: Tensor) -> Tensor:
        return -torch.sigmoid(one) @ payoff @ torch.sigmoid(two)

    def looked_ahead() -> Tensor:
        fast = detach_then_clone(other)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss(fast, own), fast, create_graph=True)
            fast = fast - 0.3 * gradient
        return torch.autograd.grad(loss(own, fast), own)[0]

    with divergence_probe.attach() as probe:
        for _ in range(ITERATIONS):
            grads = [looked_ahead(), looked_ahead()]
            torch.autograd.grad(apart.pow(2).sum(), apart)
            with torch.no_grad():
                own -= 0.05 * (grads[0] + grads[1])

    assert counted(probe) == (2 * ITERATIONS, 4 * ITERATIONS, ITERATIONS)
    assert not probe.diagnosis.findings
    steps = probe.recording.steps()
    outer = steps[steps.phase == "outer"]
    assert (outer.update_norm > 0).all()
    assert (outer.gradient_norm.isna() | (outer.gradient_norm < 0)).all()


def test_two_agents_that_both_look_ahead_first_throw_nothing_away() -> None:
    """The next gradient is of the same weights at another line; what was made is used later."""
    torch.manual_seed(0)
    a, b = torch.randn(3, requires_grad=True), torch.randn(4, requires_grad=True)
    payoff = 0.1 * torch.randn(3, 4)
    optimizer = torch.optim.SGD([a], 0.05)
    with divergence_probe.attach() as probe:
        for _ in range(10):
            (g,) = torch.autograd.grad(a @ payoff @ b + b @ b, b, create_graph=True)
            ahead_b = b - 0.1 * g
            (h,) = torch.autograd.grad(a @ payoff @ b + a @ a, a, create_graph=True)
            ahead_a = a - 0.1 * h
            (a.grad,) = torch.autograd.grad(a @ payoff @ ahead_b + a @ a, a)
            torch.autograd.grad(ahead_a @ payoff @ b + b @ b, b)
            optimizer.step()

    assert "LR004" not in {finding.rule for finding in probe.diagnosis.findings}
