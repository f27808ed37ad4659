"""Weights that are brought back into bounds after a step: the loop goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import divergence_probe
from divergence_probe.observe.projections import are_only_bounded


def clamped(values: list[Tensor], lowest: float, highest: float) -> list[Tensor]:
    return [value.clamp(lowest, highest) for value in values]


def test_bounds_are_told_from_a_restore() -> None:
    torch.manual_seed(0)
    left = [torch.randn(5, 4), torch.randn(5), torch.randn(1)]

    assert are_only_bounded(clamped(left, -0.5, 0.5), left)
    assert are_only_bounded(clamped(left, 0.0, 9.0), left)
    assert are_only_bounded([left[0].clamp_min(-0.1), *left[1:]], left)  # of one of them only
    assert are_only_bounded(clamped([10 * value for value in left], -0.1, 0.1), left) is False
    assert not are_only_bounded(left, left)  # nothing was done
    assert not are_only_bounded([torch.randn_like(value) for value in left], left)
    assert not are_only_bounded([left[0], torch.zeros(5), left[2]], left)  # a bias made anew
    assert not are_only_bounded([torch.ones(1)], [torch.zeros(1)])  # any number is a bound


def by_an_optimizer(delta: Tensor) -> Callable[[Tensor], None]:
    optimizer = torch.optim.SGD([delta], lr=0.5, maximize=True)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def by_hand(delta: Tensor) -> Callable[[Tensor], None]:
    def step(loss: Tensor) -> None:
        (slope,) = torch.autograd.grad(loss, delta)
        delta.data.add_(slope, alpha=0.5)

    return step


@pytest.mark.parametrize("way", [by_an_optimizer, by_hand])
def test_a_perturbation_that_is_clamped_after_each_step_is_one_task(
    way: Callable[[Tensor], Callable[[Tensor], None]],
) -> None:
    torch.manual_seed(0)
    w = torch.randn(20)

    with divergence_probe.attach() as probe:
        for _ in range(4):
            delta = torch.zeros(20, requires_grad=True)
            step = way(delta)
            for _ in range(12):
                step(((1 + delta) * w).relu().sum())
                with torch.no_grad():
                    delta.clamp_(-0.3, 0.3)

    summary = probe.diagnosis.to_dict()["summary"]
    assert (summary["tasks"], summary["inner_steps"]) == (4, 48)


def test_training_whose_weights_all_end_at_a_bound_is_no_inner_loop() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(6, 1), torch.randn(64, 6)
    y = x @ (3 * torch.randn(6, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    with divergence_probe.attach(net) as probe:
        for _ in range(60):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
            for parameter in net.parameters():
                parameter.data.clamp_(-0.1, 0.1)

    assert probe.diagnosis.to_dict()["verdict"] == "unobserved"


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_weights_that_are_put_back_here_and_there_do_not_begin_anew(share: float) -> None:
    """All of them are, in the twin: there each round is a task."""
    torch.manual_seed(0)
    net, x = nn.Linear(8, 4), torch.randn(16, 8)
    source = {name: p.detach().clone() for name, p in net.named_parameters()}
    adapting = torch.optim.SGD(net.parameters(), lr=0.1)
    with divergence_probe.attach(inner=adapting) as probe:
        for _ in range(12):
            adapting.zero_grad()
            logits = net(x)
            (-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()).backward()
            adapting.step()
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p.copy_(torch.where(torch.rand_like(p) < share, source[name], p))
    assert probe.diagnosis.summary.tasks == (1 if share < 1 else 12)
