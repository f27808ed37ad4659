"""Which cause explains the earliest and strongest evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from divergence_probe.diagnosis.diagnosis import RootCause
from divergence_probe.rules.finding import Finding, Mark, Severity

#: Causes that are the mechanism behind other findings come before those they bring about.
#: Stale statistics make any learning rate look too high and any mode switch harmful; bad data and
#: singular operations need no optimizer to fail; what is left of an explosion is the step size.
PRECEDENCE = (
    "raised-in-inner-loop",
    "nonfinite-input",
    "compiled-base-weights",
    "checkpoint-recompute",
    "no-parameter-change",
    "stale-running-stats",
    "singular-forward",
    "singular-backward",
    "adam-sqrt-zero",
    "low-precision",
    "optimizer-state-carryover",
    "gradient-accumulation",
    "base-mutated",
    "rank-divergence",
    "inner-lr-too-high",
    "negative-learned-lr",
    "tiny-bn-batch",
    "meta-gradient-explosion",
    "no-meta-gradient",
    "mode-not-propagated",
    "double-bn-update",
    "running-stats-leak",
    "train-eval-mismatch",
    "graph-retained",
    "hard-clipping",
    "ineffective-inner-step",
    "unused-parameters",
    "transductive-batch-statistics",
    "first-order-only",
)


#: Each was seen to make the first bad number of its task: of several, the earliest is the root.
_FIRST_BAD = ("singular-forward", "singular-backward", "adam-sqrt-zero")


@dataclass(frozen=True)
class _Candidate:
    index: int
    finding: Finding

    @property
    def order(self) -> tuple[float, ...]:
        finding = self.finding
        assert finding.cause is not None
        cause = _FIRST_BAD[0] if finding.cause in _FIRST_BAD else finding.cause
        rank = PRECEDENCE.index(cause) if cause in PRECEDENCE else len(PRECEDENCE)
        return (-finding.severity, rank, _or_late(finding.task), _or_late(finding.step))


def root_cause(findings: Sequence[Finding]) -> RootCause | None:
    """The root cause among ``findings``, or None where none names a cause above info.

    Symptoms (explosions, NaN) carry no cause of their own: where they come with findings that do,
    those explain them, whatever their severity.
    """
    named = [
        _Candidate(i, finding)
        for i, finding in enumerate(findings)
        if finding.cause is not None and finding.severity > Severity.INFO
    ]
    if not named:
        return None
    symptomatic = any(
        f.severity is Severity.ERROR and (f.cause is None or f.cause in _EXPLOSIONS)
        for f in findings
    )
    if symptomatic:
        chosen = min(named, key=lambda c: (_explains(c.finding), *c.order[1:]))
    else:
        chosen = min(named, key=lambda c: c.order)
    finding = chosen.finding
    symptoms = [
        i
        for i, other in enumerate(findings)
        if i != chosen.index
        and (other.cause == finding.cause or other.cause is None)
        and other.severity > Severity.INFO
    ]
    assert finding.cause is not None
    return RootCause(
        cause=finding.cause,
        confidence="inferred",
        summary=_summary(finding),
        fix=finding.fix,
        findings=(chosen.index, *symptoms),
        marks=_marks([finding, *(findings[i] for i in symptoms)]),
    )


#: Causes that are little more than the name of what exploded.
_EXPLOSIONS = frozenset({"meta-gradient-explosion"})

#: Causes that can make norms explode or numbers turn non-finite.
_EXPLOSIVE = frozenset(
    {
        "raised-in-inner-loop",
        "nonfinite-input",
        "stale-running-stats",
        "singular-forward",
        "singular-backward",
        "adam-sqrt-zero",
        "low-precision",
        "optimizer-state-carryover",
        "gradient-accumulation",
        "negative-learned-lr",
        "base-mutated",
        "inner-lr-too-high",
        "meta-gradient-explosion",
        "tiny-bn-batch",
        "checkpoint-recompute",
        "compiled-base-weights",
    }
)


def _explains(finding: Finding) -> int:
    return 0 if finding.cause in _EXPLOSIVE else 1


def _summary(finding: Finding) -> str:
    text = finding.message
    if text.split()[0] not in finding.layers:  # a layer's name is written as the user wrote it
        text = text[:1].upper() + text[1:]
    return text + ("" if text.endswith(".") else ".")


def _marks(findings: Sequence[Finding]) -> tuple[Mark, ...]:
    """At most four lines of the user's, one text a line."""
    marks: dict[str, Mark] = {}
    for finding in findings:
        for mark in finding.marks:
            marks.setdefault(mark.site, mark)
    return tuple(marks.values())[:4]


def _or_late(index: int | None) -> float:
    return math.inf if index is None else index
