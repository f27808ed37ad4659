"""Counts with their units, vital numbers, and how a proof reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from divergence_probe.diagnosis.diagnosis import (
    BatchNormRow,
    Diagnosis,
    Health,
    Intervention,
    NormTrace,
    RootCause,
    Summary,
)
from divergence_probe.report import concise, terminal, wording
from divergence_probe.report.vitals import health_rows
from divergence_probe.rules.finding import Finding, Severity


def finding(count: int = 1, unit: str = "task", rule: str = "X1") -> Finding:
    return Finding(rule, "x", Severity.WARNING, "m", count=count, unit=unit)


@pytest.mark.parametrize(
    ("count", "unit", "words"),
    [
        (1, "task", ""),
        (6, "outer step", "6 outer steps"),
        (1200, "step", "1,200 steps"),
        (2, "time", "2 times"),
    ],
)
def test_how_often(count: int, unit: str, words: str) -> None:
    assert wording.seen(finding(count, unit)) == words
    text = concise.render(Diagnosis("suspect", Summary(), (finding(count, unit),)))
    assert (f"m ({words})\n" in text) is bool(words)


def test_findings_that_count_different_things_count_times() -> None:
    folded = wording.by_rule([finding(3), finding(2, "outer step"), finding(4, rule="X2")])

    assert [(wording.seen(one, count)) for one, count in folded] == ["5 times", "4 tasks"]


@pytest.mark.parametrize(
    ("width", "shown"), [(80, "X1  6 outer steps  m"), (60, "X1  6 outer steps: m")]
)
def test_the_terminal_says_what_was_counted(width: int, shown: str) -> None:
    diagnosis = Diagnosis("suspect", Summary(1, 1), (finding(6, "outer step"),))

    assert shown in terminal.render(diagnosis, width=width)


def vitals(mode: str | None, health: Health | None = None, norms: bool = False) -> dict[str, str]:
    rows = (BatchNormRow("norm", {"support": mode}, 0, 1.0, 1.0, "own"),) if mode else ()
    traces = (NormTrace("w", 0, (0.0, 1.0)),) if norms else ()
    diagnosis = Diagnosis(
        "healthy", Summary(1, 1), batch_norm=rows, health=health or Health(), norms=traces
    )
    return {vital.label: f"{vital.value}: {vital.meaning}" for vital in health_rows(diagnosis)}


def test_statistics_nobody_used_are_not_called_unmeasured() -> None:
    assert vitals("train")["statistics"] == (
        "not used: BatchNorm ran in train mode only, on each batch's own statistics"
    )
    assert vitals("train→eval")["statistics"].startswith("not measured")
    assert vitals("eval", Health(running_statistics_distance=0.5))["statistics"].startswith("0.5 σ")
    assert "statistics" not in vitals(None)


def test_growth_from_zero_is_no_number() -> None:
    assert vitals(None, norms=True)["growth"].startswith("from 0: the weights adapted begin at 0")
    assert vitals(None)["growth"].startswith("not measured")


def run(name: str, outcome: str = "stable", norm: float = 9.5) -> Intervention:
    return Intervention(name, f"{name} in words", outcome, norm)


def proved(*runs: Intervention) -> Diagnosis:
    cause = RootCause("stale-running-stats", "confirmed", "s", "f", ())
    return Diagnosis("diverged", Summary(), root_cause=cause, interventions=runs)


def test_one_intervention_that_alone_stops_it() -> None:
    runs = (run("control", "diverged", 5e13), run("batch-statistics"), run("float64", "diverged"))

    assert wording.confidence_words(proved(*runs)) == (
        "confirmed: batch-statistics (batch-statistics in words; largest norm 9.5) alone stops it "
        "(largest norm 5.0e13 with nothing changed)"
    )


def test_several_that_stop_it_are_all_named() -> None:
    runs = (run("recalibrated-statistics"), run("learning-rate/10"), run("batch-statistics"))

    words = wording.confidence_words(proved(*runs))

    assert words.startswith("confirmed: each of these alone stops it: recalibrated-statistics (")
    assert "; batch-statistics (" in words
    assert words.endswith("; stable too, but no better an explanation: learning-rate/10")


def test_confirming_is_offered_only_where_it_can_prove_something() -> None:
    def words(cause: str, ranks: int = 1) -> str:
        root = RootCause(cause, "inferred", "s", "f", ())
        return wording.confidence_words(Diagnosis("suspect", Summary(ranks=ranks), root_cause=root))

    assert "--confirm" in words("stale-running-stats")
    assert "--confirm" not in words("graph-retained")
    assert "--confirm" not in words("stale-running-stats", ranks=2)
    unsettled = replace(proved(run("control")), root_cause=RootCause("x", "inferred", "s", "f", ()))
    assert "did not settle it" in wording.confidence_words(unsettled)
