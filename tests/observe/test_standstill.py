"""Updates that are made and change no weight: rounded away, of rate zero, or thrown away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import divergence_probe

TINY = 1e-11


def alarms(probe: divergence_probe.Probe) -> list[str]:
    return [f.rule for f in probe.diagnosis.findings if f.severity.label != "info"]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4)
    return x, x.sum(1, keepdim=True)


def minus(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], rate: float) -> None:
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.data -= rate * gradient


def alpha(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], rate: float) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.add_(gradient, alpha=-rate)


def foreach(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], rate: float) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(parameters), list(grads), alpha=-rate)


def flat(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], rate: float) -> None:
    vector = parameters_to_vector(parameters).detach() - rate * parameters_to_vector(grads)
    vector_to_parameters(vector, parameters)


def out(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], rate: float) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, grads, strict=True):
            torch.sub(parameter, gradient, alpha=rate, out=parameter)


def other_memory(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], rate: float) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.set_(parameter.detach() - rate * gradient)


def swapped(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor], rate: float) -> None:
    """(Torch refuses that where there are weak references, as ours.)"""
    for parameter, gradient in zip(parameters, grads, strict=True):
        new = nn.Parameter(parameter.detach() - rate * gradient)
        torch.utils.swap_tensors(parameter, new)


Step = Callable[[Sequence[nn.Parameter], Sequence[Tensor], float], None]


@pytest.mark.parametrize("step", [minus, alpha, foreach, flat, out, other_memory, swapped])
@pytest.mark.parametrize(("rate", "expected"), [(TINY, ["LR002"]), (0.0, []), (0.05, [])])
def test_copies_stepped_in_place_by_hand(step: Step, rate: float, expected: list[str]) -> None:
    base = build()
    with divergence_probe.attach() as probe:
        for _ in range(4):
            (x, y), learner = batch(), copy.deepcopy(base)
            parameters = list(learner.parameters())
            for _ in range(3):
                grads = torch.autograd.grad(F.mse_loss(learner(x), y), parameters)
                step(parameters, grads, rate)
                logged = [parameter.detach().double().norm() for parameter in parameters]
                assert all(norm > 0 for norm in logged)

    assert alarms(probe) == expected
    assert probe.diagnosis.summary.inner_steps == 12
    rows = probe.recording.steps()
    last = rows[(rows.phase == "support") & (rows.step == 2)]
    assert last.norm_after.notna().all()
    assert list(last.norm_after[-len(logged) :]) == pytest.approx([float(n) for n in logged])


@pytest.mark.parametrize("put_back", [Tensor.set_, Tensor.copy_])
def test_other_memory_is_put_back_or_written_to(put_back: Callable[..., Tensor]) -> None:
    """One model whose parameters are given other memory at each step, and reset after the last."""
    net = build()
    parameters = list(net.parameters())
    with divergence_probe.attach() as probe:
        for _ in range(4):
            (x, y), start = batch(), [parameter.detach().clone() for parameter in parameters]
            for _ in range(3):
                grads = torch.autograd.grad(F.mse_loss(net(x), y), parameters)
                other_memory(parameters, grads, 0.05)
            for parameter, value in zip(parameters, start, strict=True):
                with torch.no_grad():
                    put_back(parameter, value)

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps, alarms(probe)) == (4, 12, [])


def trained(net: nn.Module, rates: Sequence[float]) -> divergence_probe.Probe:
    """MAML with ``functional_call``, one inner rate a task."""
    outer = torch.optim.Adam(net.parameters(), 1e-3)
    with divergence_probe.attach() as probe:
        for rate in rates:
            (x, y), fast = batch(), dict(net.named_parameters())
            for _ in range(3):
                loss = F.mse_loss(functional_call(net, fast, (x,)), y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {k: w - rate * g for (k, w), g in zip(fast.items(), grads, strict=True)}
            outer.zero_grad()
            F.mse_loss(functional_call(net, fast, (x,)), y).backward()
            outer.step()
    return probe


def test_new_tensors_that_equal_the_old_ones() -> None:
    probe = trained(build(), [TINY] * 6)

    (finding,) = (f for f in probe.diagnosis.findings if f.rule == "LR002")
    assert "rounded away" in finding.message
    assert alarms(probe) == ["LR002"] * len(alarms(probe))


def test_a_rate_by_hand_that_warms_up_or_decays_to_zero() -> None:
    assert not alarms(trained(build(), [0, 0, 0, 0, 0.01, 0.02, 0.03]))
    assert not alarms(trained(build(), [0.03, 0.03, 0.03, 0.03, 0.02, 0.01, 0, 0]))


def test_a_first_layer_without_a_gradient_hides_nothing() -> None:
    net = build()
    with torch.no_grad():
        net[0].weight.zero_()  # type: ignore[operator, union-attr]
        net[0].bias.fill_(-1)  # type: ignore[operator, union-attr]
    assert not alarms(trained(net, [0.05] * 5))


@pytest.mark.parametrize(("rate", "expected"), [(TINY, {"LR002"}), (0.05, set())])
def test_tasks_batched_by_vmap(rate: float, expected: set[str]) -> None:
    net = build()
    outer = torch.optim.Adam(net.parameters(), 1e-3)

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(net, weights, (x,)), y)

    def task(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        for _ in range(3):
            slopes = grad(loss)(weights, x, y)
            weights = {name: w - rate * slopes[name] for name, w in weights.items()}
        return loss(weights, x, y)

    with divergence_probe.attach() as probe:
        for _ in range(4):
            x = torch.randn(4, 16, 4)
            outer.zero_grad()
            losses = vmap(task, (None, 0, 0))(dict(net.named_parameters()), x, x.sum(2, True))
            losses.mean().backward()
            outer.step()

    assert set(alarms(probe)) == expected


@pytest.mark.parametrize(
    ("dtype", "rate", "expected"),
    [
        (torch.bfloat16, 1e-7, ["FX006"]),
        (torch.bfloat16, 0.1, []),
        (torch.float32, 1e-12, ["FX006"]),
        (torch.float32, 0.0, []),
    ],
)
def test_an_outer_step_handed_its_gradients(
    dtype: torch.dtype, rate: float, expected: list[str]
) -> None:
    """Full-batch MAML: where nothing moves, each outer gradient is exactly the one before."""
    net = build().to(dtype)
    outer = torch.optim.SGD(net.parameters(), rate)
    x, y = (tensor.to(dtype) for tensor in batch())
    with divergence_probe.attach() as probe:
        for _ in range(6):
            fast = dict(net.named_parameters())
            for _ in range(2):
                loss = F.mse_loss(functional_call(net, fast, (x,)), y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {k: w - 0.05 * g for (k, w), g in zip(fast.items(), grads, strict=True)}
            query = F.mse_loss(functional_call(net, fast, (x,)), y)
            slopes = torch.autograd.grad(query, list(net.parameters()))
            for parameter, slope in zip(net.parameters(), slopes, strict=True):
                parameter.grad = slope
            outer.step()

    assert alarms(probe) == expected
