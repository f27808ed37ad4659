"""Function modes of the user's: a default device, or one of their own, around a whole run."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import divergence_probe
from divergence_probe.observe import mode_stack
from tests import coverage_matrix

# One in twelve, of every group: where a mode matters it does so for many. (All were run once.)
CELLS = {
    str(cell): cell
    for cell in coverage_matrix.cells()[::12]
    if not cell.style.startswith(("through numpy", "tasks of unequal"))
}
TASKS, STEPS = 4, 3


class PassingOn(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device(name="cpu"):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = pytest.mark.parametrize("surroundings", [default_device, PassingOn])


def adapting(net, x, y, rate=0.05, steps=STEPS):
    fast = dict(net.named_parameters())
    for _ in range(steps):
        loss = F.mse_loss(functional_call(net, fast, (x,)), y)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {n: w - rate * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
    return F.mse_loss(functional_call(net, fast, (x,)), y)


def make():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1)
    )
    x = torch.randn(10, 3)
    return net, x, x.sum(1, keepdim=True)


@SURROUNDINGS
@pytest.mark.parametrize("name", CELLS)
def test_a_loop_is_recorded_as_without(name, surroundings):
    with surroundings():
        result = coverage_matrix.run(CELLS[name])

    assert result.verdict == "exact", result.detail


@SURROUNDINGS
def test_layers_are_seen_as_without(surroundings):
    """A loss is handed to the mode, which calls it again: it is one loss all the same."""
    seen = []
    for around in (None, surroundings):
        net, x, y = make()
        with divergence_probe.attach(net) as probe:
            for _ in range(TASKS):
                if around is None:
                    adapting(net, x, y).backward()
                else:
                    with around():
                        adapting(net, x, y).backward()
        steps = probe.recording.steps()
        seen.append(steps[["phase", "loss"]].to_numpy().tolist())
        (block, *_) = probe.recording.blocks()
        seen[-1] += [
            [name, values.tolist()]
            for name, values in {**block.batch_norm, "dropout": block.dropout}.items()
            if name in ("bn_calls", "bn_training", "dropout")
        ]
    assert seen[0] == seen[1]


@SURROUNDINGS
@pytest.mark.parametrize("rate", [0.05, 100.0])  # healthy, and armed after an explosion
def test_the_stack_is_left_as_it_was(surroundings, rate):
    net, x, y = make()
    with surroundings():
        before = mode_stack.modes()
        with divergence_probe.attach(net) as probe:
            for _ in range(TASKS):
                adapting(net, x, y, rate, steps=25).backward()
                # what torch does here it does at the very bottom of the stack
                with torch.device("meta"):
                    assert torch.ones(1).is_meta
                with PassingOn():
                    adapting(net, x, y, rate, steps=1)
        assert mode_stack.modes() == before
    assert mode_stack.modes() == []
    assert probe.failure is None
    assert (probe.diagnosis.verdict == "diverged") == (rate > 1)


def test_nothing_of_ours_is_made_on_the_default_device():
    """Had a mode of the user's been on while we measured, it would all be on the wrong device."""
    net, x, y = make()
    with default_device("meta"), divergence_probe.attach(net) as probe:
        for _ in range(TASKS):
            adapting(net, x, y, rate=100.0, steps=25).backward()
    assert probe.failure is None
    assert probe.diagnosis.verdict == "diverged"


def test_a_mode_that_ends_meanwhile_takes_off_itself():
    net, x, y = make()
    seen = PassingOn()
    with divergence_probe.attach(net):
        fast = list(net.parameters())
        with seen:
            loss = F.mse_loss(net(x), y)
            gradients = torch.autograd.grad(loss, fast, create_graph=True)
            assert mode_stack.modes()[-1] is seen  # ours went beneath it
        assert seen not in mode_stack.modes()
        fast = [w - 0.1 * g for w, g in zip(fast, gradients, strict=True)]
    assert mode_stack.modes() == []
