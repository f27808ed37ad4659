"""What must work without looking at values, for on an accelerator a look waits for the device.

The CPU stands in for one: values may be looked at there, so the probe is told that they may not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import divergence_probe
from divergence_probe.observe import at_hand
from tests import coverage_matrix, test_coverage_matrix

#: Written through ``.data``, where neither torch's count nor memory tells, in part or in whole.
MAY_BE_INCOMPLETE = (
    *test_coverage_matrix.MAY_BE_INCOMPLETE,
    "by hand: one model, put back",
    "torch.optim: one model, outer gradient: queries' mean, first order, by hand",
    "torch.optim: one model, outer gradient: way back, first order, by hand",
)
CELLS = {str(cell): cell for cell in coverage_matrix.cells()}
CELLS = dict(list(CELLS.items())[::10]) | {
    name: cell for name, cell in CELLS.items() if "one model" in name or "Reptile" in name
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TASKS, STEPS = 4, 3
ROOT = Path(__file__).parent.parent.parent
SCRIPTS = [
    "faulty/adam-sqrt-zero/hand_written_adam.py",
    "faulty/base-mutated/state_dict_alias_restore.py",
    "faulty/hard-clipping/deepcopy_clip_grad_norm_tiny.py",
    "faulty/hard-clipping/inner_clamp_value.py",
    "faulty/hard-clipping/outer_clip_always_active.py",
    "faulty/nonfinite-input/log_counts_rnn.py",
    "faulty/optimizer-state-carryover/restored_weights_shared_adam.py",
    "faulty/singular-backward/pairwise_distance_regulariser.py",
    "faulty/singular-forward/bce_by_hand_saturates.py",
    "healthy/base-mutated/sharpness_aware_learners.py",
    "healthy/ordinary/averaged_weights_swapped.py",
    "healthy/ordinary/best_state_restored.py",
    "healthy/train-eval-mismatch/fedavg_first_round_untrained.py",
]


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


@pytest.mark.parametrize("name", CELLS)
def test_a_loop_is_recorded_as_it_happened_or_said_to_be_incomplete(name):
    test_coverage_matrix.assert_exact(CELLS[name], MAY_BE_INCOMPLETE)


def test_causes_are_found_as_on_the_cpu():
    """No false alarm for want of a look, and clipping and causes of NaN are seen."""
    command = [sys.executable, "-m", "tests.zoo.score", "--afar", "--only", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


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
