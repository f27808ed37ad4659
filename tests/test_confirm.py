"""``--confirm``: real re-runs of tiny scripts, and the rules that judge them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from divergence_probe.diagnosis import confirm
from divergence_probe.diagnosis.confirm import Measured
from divergence_probe.diagnosis.diagnosis import Diagnosis, RootCause, Summary
from divergence_probe.record.reader import Recording
from divergence_probe.replay import replay
from divergence_probe.rules.finding import Finding, Severity

from .command_line import probe, strict_json, write_script

STALE = """
import higher, torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
nn.init.normal_(net[0].weight, std=30.0)
net.eval()
inner = torch.optim.SGD(net.parameters(), lr=0.2)
for task in range(3):
    x, y = torch.randn(24, 6), torch.arange(3).repeat(8)
    with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (fast, steps):
        for _ in range(5):
            steps.step(F.cross_entropy(fast(x), y))
open("ran-to-the-end", "a").write("x")
"""

CARRIED = """
import copy, torch
from torch.nn import functional as F

torch.manual_seed(0)
net = torch.nn.Linear(4, 1)
start = copy.deepcopy(net.state_dict())
inner = torch.optim.Adam(net.parameters(), lr=0.01)
for task in range(4):
    net.load_state_dict(start)
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    for _ in range(4):
        inner.zero_grad()
        F.mse_loss(net(x), y).backward()
        inner.step()
"""


def confirmed_run(folder: Path, body: str, *options: str) -> tuple[dict[str, Any], str]:
    (folder / "train.py").write_text(textwrap.dedent(body), encoding="utf-8")
    arguments = ("-o", "rec", "--json", "r.json", "--confirm", *options, "train.py")
    ended = probe(folder, "run", *arguments, env={"OMP_NUM_THREADS": "1"})
    return strict_json(folder / "r.json"), ended.stderr


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {run["name"]: run["outcome"] for run in report["interventions"]}


def test_stale_statistics_are_confirmed_against_a_smaller_learning_rate(tmp_path: Path) -> None:
    report, stderr = confirmed_run(tmp_path, STALE)
    cause = report["root_cause"]
    assert (cause["cause"], cause["confidence"]) == ("stale-running-stats", "confirmed"), stderr
    assert report["verdict"] == "diverged"
    assert outcomes(report)["control"] == "diverged"
    assert outcomes(report)["batch-statistics"] == "stable"
    assert "learning-rate/10" in outcomes(report)
    # The re-runs stopped at the task in question: only the first run came to the end.
    assert (tmp_path / "ran-to-the-end").read_text() == "x"
    stored = replay(Recording(tmp_path / "rec"))
    assert stored.root_cause is not None and stored.root_cause.confidence == "confirmed"
    assert [run.name for run in stored.interventions] == list(outcomes(report))


def test_learning_rate_too_high_is_confirmed(tmp_path: Path) -> None:
    script = write_script(tmp_path, "for _ in loop(8.0): pass").read_text()
    report, stderr = confirmed_run(tmp_path, script)
    cause = report["root_cause"]
    assert (cause["cause"], cause["confidence"]) == ("inner-lr-too-high", "confirmed"), stderr
    assert outcomes(report) == {"control": "diverged", "learning-rate/10": "stable"}


def test_carried_optimizer_state_is_confirmed(tmp_path: Path) -> None:
    report, stderr = confirmed_run(tmp_path, CARRIED)
    cause = report["root_cause"]
    assert cause["cause"] == "optimizer-state-carryover"
    assert cause["confidence"] == "confirmed", stderr
    assert outcomes(report) == {"control": "as before", "fresh-optimizer-state": "stable"}


def test_a_control_that_does_not_reproduce_confirms_nothing(tmp_path: Path) -> None:
    body = """
    import pathlib
    ran = pathlib.Path("ran")
    first, _ = not ran.exists(), ran.touch()
    for _ in loop(8.0 if first else 0.01): pass
    """
    script = write_script(tmp_path, body).read_text()
    report, stderr = confirmed_run(tmp_path, script)
    assert report["root_cause"]["confidence"] == "inferred"
    assert outcomes(report) == {"control": "stable"}
    assert "did not reproduce" in stderr


def test_a_re_run_ends_with_its_time_and_says_what_input_is_missing(tmp_path: Path) -> None:
    body = """
    import pathlib, time
    ran = pathlib.Path("ran")
    if ran.exists():
        sys.stdin.read()
        time.sleep(60)
    ran.touch()
    for _ in loop(8.0): pass
    """
    script = write_script(tmp_path, body).read_text()
    report, stderr = confirmed_run(tmp_path, script, "--confirm-timeout", "12")
    assert outcomes(report) == {"control": "timed out"}
    assert report["root_cause"]["confidence"] == "inferred"
    assert "standard input" in stderr


def _first(cause: str) -> Diagnosis:
    exploded = Finding("NF001", "non-finite-in-inner-loop", Severity.ERROR, "nan", task=2, step=1)
    named = Finding("BN001", "stale", Severity.ERROR, "stale", cause=cause, task=0)
    root = RootCause(cause, "inferred", "", "", (1, 0))
    return Diagnosis("diverged", Summary(), (exploded, named), root)


def _diverged() -> Measured:
    return Measured("reached", _first("x").findings[:1])


@pytest.mark.parametrize(
    ("losses", "confirmed"), [((9.0, 4.0), True), ((9.0, 0.1), False), ((9.0, 12.0), True)]
)
def test_a_smaller_rate_refutes_only_by_ending_much_better(
    losses: tuple[float, ...], confirmed: bool
) -> None:
    runs = {
        "control": _diverged(),
        "batch-statistics": Measured("reached", (), 3.0, "w", 1.1, (1.5, 0.5)),
        "learning-rate/10": Measured("reached", (), 3.0, "w", 1.1, losses),
    }
    assert confirm.judge(_first("stale-running-stats"), runs).confirmed is confirmed


def test_a_stable_rival_refutes_the_learning_rate() -> None:
    calm = Measured("reached", (), 3.0, "w", 1.1, (1.5, 0.5))
    runs = {"control": _diverged(), "learning-rate/10": calm, "batch-statistics": calm}
    ruling = confirm.judge(_first("inner-lr-too-high"), runs)
    assert not ruling.confirmed and "batch-statistics" in ruling.reason


def test_the_re_runs_go_to_the_explosion_and_not_to_the_first_evidence() -> None:
    symptom = confirm.symptom(_first("stale-running-stats"))
    assert symptom is not None and symptom.task == 2


def test_several_proofs_are_all_named() -> None:
    calm = Measured("reached", (), 3.0, "w", 1.1, (1.5, 0.5))
    runs = {"control": _diverged(), "batch-statistics": calm, "recalibrated-statistics": calm}

    ruling = confirm.judge(_first("stale-running-stats"), runs)

    assert ruling.confirmed
    assert ruling.reason == "each of batch-statistics and recalibrated-statistics alone stops it"
    one = {**runs, "recalibrated-statistics": _diverged()}
    assert (
        confirm.judge(_first("stale-running-stats"), one).reason
        == "batch-statistics alone stops it"
    )


@pytest.mark.parametrize(
    ("losses", "said"),
    [((1.5, 90.0, 4e7), "changes nothing in this loop"), ((1.5, 20.0, 4e7), "no re-run without")],
)
def test_a_change_that_had_nothing_to_act_on(losses: tuple[float, ...], said: str) -> None:
    def ended(losses: tuple[float, ...]) -> Measured:
        return Measured("reached", _first("x").findings[:1], losses=losses)

    runs = {"control": ended((1.5, 90.001, 3e8)), "learning-rate/10": ended(losses)}

    ruling = confirm.judge(_first("inner-lr-too-high"), runs)

    assert not ruling.confirmed and said in ruling.reason


def test_roots_of_zero_taken_in_place_are_shifted_too() -> None:
    import torch

    from divergence_probe.observe.interventions.square_root import _Shifted

    for root in (lambda v: v.sqrt(), lambda v: (v + 0.0).sqrt_(), lambda v: v**0.5):
        moment = torch.tensor([0.0, 4.0], requires_grad=True)
        with _Shifted():  # type: ignore[no-untyped-call]
            root(moment).sum().backward()
        assert moment.grad is not None and torch.isfinite(moment.grad).all()


@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 16, 8, 8), 8), ((2, 16, 1, 1), 1), ((4, 64), 4), ((1, 7, 9, 9), 1)]
)
def test_groups_are_never_tiny_themselves(shape: tuple[int, ...], groups: int) -> None:
    import torch

    from divergence_probe.observe.interventions.statistics import _groups

    assert _groups(torch.zeros(shape)) == groups
