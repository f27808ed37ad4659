"""A normalisation layer has one name, wherever it is met."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe


class Anil(nn.Module):
    """Features that no task adapts, and a head that each does."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.classifier = nn.Linear(8, 3)

    def forward(self, x, head):
        return F.linear(self.features(x), *head)


def anil():
    net = Anil()
    outer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(3):
        total = torch.zeros(())
        for _ in range(4):
            x, y = torch.randn(16, 4), torch.randint(3, (16,))
            head = list(net.classifier.parameters())
            gradients = torch.autograd.grad(
                F.cross_entropy(net(x, head), y), head, create_graph=True
            )
            fast = [w - 0.4 * g for w, g in zip(head, gradients, strict=True)]
            total = total + F.cross_entropy(net(x, fast), y)
        outer.zero_grad()
        total.backward()
        outer.step()


class Wrapper(nn.Module):
    """Holds a copy of a model."""

    def __init__(self, model):
        super().__init__()
        self.net = copy.deepcopy(model)

    def forward(self, x):
        return self.net(x)


def copies_in_a_wrapper():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    for _ in range(4):
        inner = Wrapper(net)
        optimizer = torch.optim.SGD(inner.parameters(), 0.1)
        x, y = torch.randn(16, 4), torch.randint(3, (16,))
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(inner(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            inner(x)


@pytest.mark.parametrize(("loop", "name"), [(anil, "features.1"), (copies_in_a_wrapper, "1")])
def test_a_layer_has_one_name(loop, name):
    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        loop()
    calls = probe.recording.batch_norm()
    assert set(calls["layer"]) == {name}
