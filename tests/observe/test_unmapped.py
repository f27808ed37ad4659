"""Gradients of many tasks that leave the vmap they were taken in: the update is made outside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import divergence_probe

Tensors = dict[str, Tensor]
ITERATIONS, TASKS, STEPS, RATE = 4, 3, 3, 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def expanded(weight: Tensor) -> Tensor:
    return weight.expand(TASKS, *weight.shape)


def stacked(weight: Tensor) -> Tensor:
    return torch.stack([weight] * TASKS)


@pytest.mark.parametrize("spread", [expanded, stacked])
def test_steps_that_are_made_outside_of_the_vmap(spread: Callable[[Tensor], Tensor]) -> None:
    net = network()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    norms: list[float] = []

    def loss(weights: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(net, weights, (x,)), y)

    gradients_of = vmap(grad(loss))
    with divergence_probe.attach(net) as probe:
        for _ in range(ITERATIONS):
            x, y = torch.randn(TASKS, 5, 4), torch.randn(TASKS, 5, 2)
            weights = {name: spread(weight) for name, weight in net.named_parameters()}
            for _ in range(STEPS):
                norms += weights["0.weight"].detach().flatten(1).norm(dim=1).tolist()
                gradients = gradients_of(weights, x, y)
                weights = {n: w - RATE * gradients[n] for n, w in weights.items()}
            outer.zero_grad()
            vmap(loss)(weights, x, y).mean().backward()  # type: ignore[no-untyped-call]
            outer.step()

    assert probe.failure is None
    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (
        ITERATIONS * TASKS,
        ITERATIONS * TASKS * STEPS,
    )
    assert any("left the vmap" in sentence for sentence in summary.incomplete)
    steps = probe.recording.steps()
    of_first = steps[(steps.phase == "support") & (steps.parameter == steps.parameter.iloc[0])]
    assert of_first.norm_before.tolist() == pytest.approx(norms, rel=1e-6)
    seen = steps[(steps.phase == "support") & (steps.step < STEPS - 1)]
    assert seen.step_rate.to_numpy() == pytest.approx(RATE, rel=1e-3)
    if spread is expanded:
        assert steps.parameter.iloc[0] == "0.weight"
        assert summary.outer_steps == ITERATIONS


@pytest.mark.parametrize("detached", [True, False])
def test_gradients_of_single_samples_are_no_tasks(detached: bool) -> None:
    """Their own weights they do not have; an optimizer takes the step with their mean."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)

    def loss(weights: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(net, weights, (x[None],)), y[None])

    with divergence_probe.attach(net) as probe:
        for _ in range(ITERATIONS * STEPS):
            x, y = torch.randn(5, 4), torch.randn(5, 2)
            weights = {n: w.detach() if detached else w for n, w in net.named_parameters()}
            gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
            for name, parameter in net.named_parameters():
                parameter.grad = gradients[name].mean(0).detach()
            optimizer.step()

    assert probe.failure is None
    assert probe.diagnosis.verdict == "unobserved"
