"""Updates that are loaded into other weights: into a second network, from one vector of all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import divergence_probe

RATE, ROUNDS = 0.1, 6


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def loaded(vector: Tensor, base: nn.Module) -> nn.Module:
    twin, state, at = network(), base.state_dict(), 0
    for name, parameter in base.named_parameters():
        state[name] = vector[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    twin.load_state_dict(state)
    return twin


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return F.mse_loss(net(x), x.sum(1, keepdim=True))


def ahead(base: nn.Module, x: Tensor) -> nn.Module:
    """A twin of ``base`` that is a step further."""
    start = flat(list(base.parameters())).detach()
    slope = flat(list(torch.autograd.grad(loss_of(base, x), list(base.parameters())))).detach()
    return loaded(start - RATE * slope, base)


def test_a_step_loaded_into_a_second_network_is_exact() -> None:
    torch.manual_seed(0)
    base, norms = network(), []
    outer = torch.optim.SGD(base.parameters(), lr=0.05)

    with divergence_probe.attach(base) as probe:
        for _ in range(ROUNDS):
            x = torch.randn(8, 3)
            twin = ahead(base, x)
            norms.append([float(p.detach().norm()) for p in twin.parameters()])
            grads = torch.autograd.grad(loss_of(twin, x), list(twin.parameters()))
            for parameter, gradient in zip(base.parameters(), grads, strict=True):
                parameter.grad = gradient
            outer.step()

    steps = probe.recording.steps()
    inner = steps[steps.phase == "support"]
    for name, column in zip(dict(base.named_parameters()), zip(*norms, strict=True), strict=True):
        found = inner[inner.parameter == name].norm_after
        torch.testing.assert_close(
            torch.tensor(found.to_numpy()), torch.tensor(column).double(), rtol=1e-6, atol=0
        )
    assert probe.diagnosis.to_dict()["summary"]["tasks"] == ROUNDS
    assert probe.diagnosis.to_dict()["summary"]["inner_steps"] == ROUNDS
    assert probe.diagnosis.to_dict()["verdict"] == "healthy"


def test_gradients_loaded_elsewhere_are_no_step() -> None:
    """A control variate is a network of gradients, and nothing is adapted by it."""
    torch.manual_seed(0)
    base, variate = network(), network()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.05)

    with divergence_probe.attach(base) as probe:
        for _ in range(ROUNDS):
            x = torch.randn(8, 3)
            slope = torch.autograd.grad(loss_of(base, x), list(base.parameters()))
            with torch.no_grad():
                for kept, gradient in zip(variate.parameters(), slope, strict=True):
                    kept.copy_(gradient)
            optimizer.zero_grad()
            loss_of(base, x).backward()
            optimizer.step()

    assert probe.diagnosis.to_dict()["verdict"] == "unobserved"


def perturbed(base: nn.Module, twin: nn.Module, x: Tensor, back: bool) -> None:
    """Take gradients on both sides of ``base``, as DARTS does; maybe do not go ``back``."""
    rates = torch.ones(3, requires_grad=True)
    slope = torch.autograd.grad(loss_of(twin, x), list(twin.parameters()))
    for by in (0.01, -0.02, 0.01 if back else 0.0):
        for parameter, part in zip(base.parameters(), slope, strict=True):
            parameter.data.add_(part, alpha=by)
        torch.autograd.grad(loss_of(base, x * rates), rates)


def test_a_base_that_is_perturbed_and_put_back_takes_no_outer_step() -> None:
    for back in (True, False):
        torch.manual_seed(0)
        base = network()
        with divergence_probe.attach(base) as probe:
            for _ in range(ROUNDS):
                x = torch.randn(8, 3)
                perturbed(base, ahead(base, x), x, back)

        steps = probe.recording.steps()
        outer = steps[steps.phase == "outer"]
        assert probe.diagnosis.to_dict()["summary"]["tasks"] == ROUNDS
        assert len(outer[outer.parameter == "0.weight"]) == (0 if back else ROUNDS)
