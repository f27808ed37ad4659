"""Ordinary training that goes back to a state of its own is no row of inner loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

STEPS, ROUNDS = 6, 8


class Training:
    """A net, an optimizer that is kept, and data."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)

    def run(self, optimizer=None, steps=STEPS):
        optimizer = optimizer or self.optimizer
        for _ in range(steps):
            x = torch.randn(16, 2)
            optimizer.zero_grad()
            F.mse_loss(self.net(x), x[:, :1] * x[:, 1:]).backward()
            optimizer.step()

    def loss(self):
        with torch.no_grad():
            x = torch.randn(64, 2)
            return F.mse_loss(self.net(x), x[:, :1] * x[:, 1:]).item()


def watched(loop):
    training = Training()
    with divergence_probe.attach() as probe:
        loop(training)
    found = probe.diagnosis
    return found.summary.tasks, found.summary.inner_steps, {f.rule for f in found.findings}


def deep_copy(net):
    return copy.deepcopy(net.state_dict())


def whole_copy(net):
    return copy.deepcopy(net).state_dict()


def file(net):
    import io

    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("keep", [deep_copy, whole_copy, file])
def test_back_to_the_best_state(keep):
    def loop(training):
        best = None
        for number in range(ROUNDS):
            training.run()
            if number in (0, 3):
                best = keep(training.net)
            else:
                training.net.load_state_dict(best)
                for group in training.optimizer.param_groups:
                    group["lr"] *= 0.5

    assert watched(loop) == (0, 0, set())


def test_averaged_weights_swapped_in_and_out():
    def loop(training):
        average = deep_copy(training.net)
        for _ in range(ROUNDS):
            training.run()
            for name, value in training.net.state_dict().items():
                average[name].lerp_(value, 0.1)
            own = deep_copy(training.net)
            training.net.load_state_dict(average)
            training.loss()
            training.net.load_state_dict(own)

    assert watched(loop) == (0, 0, set())


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh optimizers", "one optimizer"])
def test_another_optimizer_that_begins_there_adapts(fresh):
    """Source training, and then test-time adaptation of what it came to."""

    def loop(training):
        training.run(steps=20)
        source = deep_copy(training.net)
        inner = torch.optim.SGD(training.net.parameters(), lr=0.01)
        for _ in range(ROUNDS):
            training.net.load_state_dict(source)
            if fresh:
                inner = torch.optim.SGD(training.net.parameters(), lr=0.01)
            training.run(inner)

    tasks, steps, _ = watched(loop)

    assert (tasks, steps) == (ROUNDS, ROUNDS * STEPS)


def test_back_to_where_nothing_had_been_stepped_yet():
    """The same optimizer, but the state was kept before its first step, and again after each."""

    def loop(training):
        for _ in range(ROUNDS):
            start = deep_copy(training.net)
            training.run()
            training.net.load_state_dict(start)

    assert watched(loop)[:2] == (ROUNDS, ROUNDS * STEPS)


def test_moved_in_between_is_no_state_it_came_to():
    """Reptile: the weights a state is asked of were moved since the last step."""

    def loop(training):
        parameters = list(training.net.parameters())
        for _ in range(ROUNDS):
            start = deep_copy(training.net)
            training.run()
            with torch.no_grad():
                for parameter, old in zip(parameters, start.values(), strict=True):
                    parameter.lerp_(old, 0.7)
            training.net.load_state_dict(deep_copy(training.net))

    assert watched(loop)[:2] == (ROUNDS, ROUNDS * STEPS)
