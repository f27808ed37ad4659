"""``assert_no_divergence`` and its kin, on real loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import higher
import pytest
import torch

import divergence_probe
from divergence_probe import assert_no_divergence, attach, diagnose, load
from divergence_probe.errors import RecordingError, UsageError


def adapt(lr: float) -> None:
    """One task of three inner steps; at 1e6 it diverges."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    inner = torch.optim.SGD(net.parameters(), lr=lr)
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    with higher.innerloop_ctx(net, inner) as (fast, steps):
        for _ in range(3):
            steps.step(((fast(x) - y) ** 2).mean())


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[float], Path]:
    def record(lr: float) -> Path:
        with attach(output=tmp_path / str(lr)):
            adapt(lr)
        return tmp_path / str(lr)

    return record


def test_healthy_subjects_of_every_kind_pass(recorded: Callable[[float], Path]) -> None:
    path = recorded(0.01)
    with attach() as probe:
        adapt(0.01)
        assert_no_divergence(probe)  # still attached
    assert_no_divergence(probe, thresholds={"norm-growth": 20.0})
    for subject in (probe, probe.diagnosis, path, str(path), load(path), lambda: adapt(0.01)):
        assert_no_divergence(subject, fail_on="warning")


def test_diverging_subjects_of_every_kind_fail(recorded: Callable[[float], Path]) -> None:
    path = recorded(1e6)
    with attach() as probe:
        adapt(1e6)
        with pytest.raises(AssertionError):
            assert_no_divergence(probe)
    for subject in (probe, probe.diagnosis, path, str(path), load(path), lambda: adapt(1e6)):
        with pytest.raises(AssertionError, match="diverged"):
            assert_no_divergence(subject)
    with pytest.raises(AssertionError, match="diverged"):
        assert_no_divergence(probe, thresholds={"norm-growth": 20.0})


def test_the_message_says_what_to_do() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_no_divergence(lambda: adapt(1e6))
    message = str(caught.value)
    assert "1 task, 3 inner steps" in message
    assert "Why    " in message
    assert "test_testing.py:" in message
    assert "‖w‖" in message and "in 3 steps (task 0)" in message
    assert "probe rule " in message
    codes = message.rpartition("ignore=[")[2].partition("]")[0]
    assert_no_divergence(lambda: adapt(1e6), ignore=[code.strip(" '") for code in codes.split(",")])


def test_ignore_and_select_decide(recorded: Callable[[float], Path]) -> None:
    diagnosis = diagnose(recorded(1e6))
    codes = {finding.rule for finding in diagnosis.findings if finding.severity.label == "error"}
    assert_no_divergence(diagnosis, ignore=codes)
    assert_no_divergence(diagnosis, select=["MODE"])
    assert_no_divergence(diagnosis, select="MODE")
    kept = codes.pop()
    with pytest.raises(AssertionError, match=kept):
        assert_no_divergence(diagnosis, ignore=codes)


def test_unobserved_is_not_healthy() -> None:
    with pytest.raises(AssertionError, match=r"No inner step was seen(.|\n)*probe run"):
        assert_no_divergence(lambda: None)


def test_own_exception_passes_through() -> None:
    def broken() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        assert_no_divergence(broken)


def test_what_cannot_be_done_is_said(tmp_path: Path, recorded: Callable[[float], Path]) -> None:
    with pytest.raises(UsageError, match="int"):
        assert_no_divergence(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fail_on='info'"):
        assert_no_divergence(lambda: None, fail_on="info")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="ZZ9"):
        assert_no_divergence(lambda: None, ignore=["ZZ9"])
    with pytest.raises(RecordingError, match="holds no recording"):
        load(tmp_path)
    with pytest.raises(UsageError, match="no threshold named"):
        diagnose(recorded(0.01), thresholds={"nothing": 1.0})


def test_public_names_lead_here() -> None:
    assert divergence_probe.diagnose is diagnose
    assert set(divergence_probe.__all__) <= set(dir(divergence_probe))


@pytest.mark.filterwarnings("ignore:divergence_probe switched itself off")
def test_a_run_that_was_not_watched_to_its_end_fails() -> None:
    with attach() as probe:
        adapt(0.01)
        probe.session.guard.fail(ValueError("ours"))
        adapt(1e6)
    with pytest.raises(AssertionError, match=r"not watched to its end.*switched itself off"):
        assert_no_divergence(probe)


def test_a_recording_without_an_end_fails(recorded: Callable[[float], Path]) -> None:
    folder = recorded(0.01)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "complete": False}))
    with pytest.raises(AssertionError, match=r"not watched to its end.*killed"):
        assert_no_divergence(folder)
