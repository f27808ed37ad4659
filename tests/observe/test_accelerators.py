"""What must work without looking at values, for on an accelerator a look waits for the device.

The CPU stands in for one: values may be looked at there, so the probe is told that they may not.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import divergence_probe
from divergence_probe.observe import at_hand

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TASKS, STEPS = 4, 3


@pytest.fixture(autouse=True)
def _values_may_not_be_looked_at(monkeypatch):
    """Everywhere: who looks at values asks this function, by whatever name it was imported."""
    monkeypatch.setattr(at_hand.waits_for_nothing, "__code__", (lambda tensor: False).__code__)


@pytest.fixture(params=DEVICES)
def net(request):
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1).to(request.param)


def batch(net):
    x = torch.randn(8, 3, device=net.weight.device)
    return x, x.sum(1, keepdim=True)


def steps_of_tasks(probe):
    rows = probe.recording.steps()
    rows = rows[(rows["phase"] == "support") & (rows["parameter"] == "weight")]
    return list(rows.groupby("task").size())


def restore(net, saved):
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), saved, strict=True):
            parameter.copy_(value)


def test_a_restore_between_optimizer_tasks_is_noticed(net):
    with divergence_probe.attach(net) as probe:
        saved = [p.detach().clone() for p in net.parameters()]
        for _ in range(TASKS):
            restore(net, saved)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            for _ in range(STEPS):
                optimizer.zero_grad()
                F.mse_loss(net(batch(net)[0]), batch(net)[1]).backward()
                optimizer.step()

    assert steps_of_tasks(probe) == [STEPS] * TASKS


def test_a_restore_between_tasks_by_hand_is_noticed(net):
    with divergence_probe.attach(net) as probe:
        saved = [p.detach().clone() for p in net.parameters()]
        for _ in range(TASKS):
            restore(net, saved)
            for _ in range(STEPS):
                x, y = batch(net)
                gradients = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                        parameter -= 0.05 * gradient

    assert steps_of_tasks(probe) == [STEPS] * TASKS


def test_ordinary_training_is_not_taken_for_tasks(net):
    with divergence_probe.attach(net) as probe:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(TASKS * STEPS):
            x, y = batch(net)
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()

    assert probe.diagnosis.verdict == "unobserved"
