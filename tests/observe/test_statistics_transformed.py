"""BatchNorm inside the gradients of ``torch.func``: recorded as with ``autograd.grad``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import divergence_probe

Tensors = dict[str, Tensor]
TASKS, STEPS, RATE = 3, 2, 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def loss(weights: Tensors, net: nn.Module, buffers: Tensors, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.func.functional_call(net, {**weights, **buffers}, (x,)), y)


def by_autograd(weights: Tensors, *rest: object) -> Tensors:
    value = loss(weights, *rest)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True)
    return dict(zip(weights, gradients, strict=True))


def by_grad(weights: Tensors, *rest: object) -> Tensors:
    return torch.func.grad(loss)(weights, *rest)  # type: ignore[no-any-return]


def by_value_too(weights: Tensors, *rest: object) -> Tensors:
    return torch.func.grad_and_value(loss)(weights, *rest)[0]  # type: ignore[no-any-return]


def by_vjp(weights: Tensors, *rest: object) -> Tensors:
    value, pull_back = torch.func.vjp(lambda own: loss(own, *rest), weights)  # type: ignore[arg-type]
    return pull_back(torch.ones_like(value))[0]  # type: ignore[no-any-return]


def table(gradient: Callable[..., Tensors], training: bool) -> pd.DataFrame:
    """What is recorded of BatchNorm in a short MAML whose tasks have buffers of their own."""
    net = network().train(training)
    outer = torch.optim.SGD(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    with divergence_probe.attach(net) as probe:
        for _ in range(TASKS):
            weights = dict(net.named_parameters())
            buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
            x, y = 3 * torch.randn(6, 1, 4, 4, generator=generator) + 1, torch.arange(6) % 3
            for _ in range(STEPS):
                gradients = gradient(weights, net, buffers, x, y)
                weights = {n: w - RATE * gradients[n] for n, w in weights.items()}
            outer.zero_grad()
            loss(weights, net, buffers, x, y).backward()  # type: ignore[no-untyped-call]
            outer.step()
    assert probe.failure is None
    found = probe.recording.batch_norm()
    return found.drop(columns=["loss", "learning_rate", "instability", "seconds", "site"])


@pytest.mark.parametrize(
    ("gradient", "training"),
    [
        *(
            (gradient, training)
            for gradient in (by_grad, by_value_too)
            for training in (True, False)
        ),
        (by_vjp, False),  # (buffers that a vjp captures may not be written to)
    ],
)
def test_statistics_are_those_that_autograd_shows(
    gradient: Callable[..., Tensors], training: bool
) -> None:
    expected, found = table(by_autograd, training), table(gradient, training)
    assert len(expected) == TASKS * (STEPS + 1)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6)


def test_statistics_of_all_tasks_of_a_vmap() -> None:
    net = network().eval()
    weights = {n: w.detach() for n, w in net.named_parameters()}
    x, y = 3 * torch.randn(TASKS, 6, 1, 4, 4) + 1, (torch.arange(6) % 3).expand(TASKS, 6)
    buffers = dict(net.named_buffers())

    def adapt(x: Tensor, y: Tensor) -> Tensors:
        own = weights
        for _ in range(STEPS):
            gradients = torch.func.grad(loss)(own, net, buffers, x, y)
            own = {n: w - RATE * gradients[n] for n, w in own.items()}
        return own

    with divergence_probe.attach(net) as probe:
        torch.func.vmap(adapt)(x, y)
    assert probe.failure is None
    found = probe.recording.batch_norm()
    assert set(zip(found.task, found.step, strict=True)) == {
        (task, step) for task in range(TASKS) for step in range(STEPS)
    }
    assert (found["values"] == 6 * 4).all()
    with torch.no_grad():
        hidden = net[0](x.flatten(0, 1))  # type: ignore[index]
    variance, mean = torch.var_mean(hidden, (0, 2, 3))
    distance = float((mean.square() / variance).mean().sqrt())
    assert np.allclose(found[found.step == 0].mean_distance, distance, rtol=0.02)
