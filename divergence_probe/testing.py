"""For tests and notebooks: assert that inner loops behave, and read recordings again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from divergence_probe.errors import UsageError

if TYPE_CHECKING:
    from divergence_probe.diagnosis.diagnosis import Diagnosis, NormTrace
    from divergence_probe.probe import Probe
    from divergence_probe.record.reader import Recording
    from divergence_probe.report.presented import PresentedDiagnosis
    from divergence_probe.rules.finding import Finding
    from divergence_probe.rules.selection import Selection

Level = Literal["error", "warning"]
Where = str | os.PathLike[str]


def load(path: Where) -> Recording:
    """Open a recording, finished or not.

    Raises:
        RecordingError: there is none at ``path``.
    """
    from divergence_probe.record.reader import Recording

    return Recording(Path(path))


def diagnose(
    recording: Recording | Where,
    *,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    intent: str | Iterable[str] = (),
    thresholds: Mapping[str, float] | None = None,
) -> PresentedDiagnosis:
    """Judge a recording again; what is not given here holds as the run itself had it.

    Args:
        recording: a recording, or its folder.
        select: rule codes or prefixes to keep.
        ignore: rule codes or prefixes to drop.
        intent: what is meant, so that it is not remarked on, such as ``"reptile"``.
        thresholds: overrides by name.

    Raises:
        RecordingError: there is no recording at that path.
        UsageError: an unknown rule code, intent or threshold.
    """
    from divergence_probe.replay import replay
    from divergence_probe.rules.registry import select as selected

    opened = load(recording) if isinstance(recording, str | os.PathLike) else recording
    return replay(opened, selected(select, ignore, intent), thresholds)


def assert_no_divergence(
    subject: Probe | Recording | Diagnosis | Callable[[], object] | Where,
    *,
    fail_on: Level = "error",
    ignore: str | Iterable[str] = (),
    select: str | Iterable[str] = (),
    intent: str | Iterable[str] = (),
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Fail where an inner loop diverged, where none was seen, or the probe did not see its end.

    Args:
        subject: a probe (also one still attached), a recording or its folder, a diagnosis, or a
            callable without arguments, which is run under :func:`divergence_probe.attach`.
        fail_on: the least severity that fails.
        ignore: rule codes or prefixes that are accepted; ``CODE:GLOB`` for layers only.
        select: rule codes or prefixes to look at; all by default.
        intent: what is meant, such as ``"reptile"`` or ``"transductive"``.
        thresholds: overrides by name.

    Raises:
        AssertionError: with the verdict, the cause, the line, the fix, and what to do.
        UsageError: an unknown rule code, intent or threshold, or a subject of another kind.
        RecordingError: there is no recording at that path.
        Exception: whatever the callable raises.
    """
    from divergence_probe.rules.finding import Severity
    from divergence_probe.rules.registry import select as selected

    if fail_on not in ("error", "warning"):
        raise UsageError(f"fail_on={fail_on!r}: choose 'error' or 'warning'.")
    if isinstance(subject, str | os.PathLike):
        subject = load(subject)
    diagnosis = _diagnosis_of(subject, selected(select, ignore, intent), thresholds)
    level = Severity.of(fail_on)
    failing = [finding for finding in diagnosis.findings if finding.severity >= level]
    if failing:
        raise AssertionError(_failed(diagnosis, failing))
    raised = diagnosis.exception
    if raised is not None and raised.inner_loop:
        raise AssertionError(
            f"{raised.type} was raised inside an inner loop at {raised.site or 'an unknown line'}: "
            f"{raised.message}"
        )
    if not diagnosis.summary.inner_steps:
        raise AssertionError(_unobserved())
    if diagnosis.verdict == "unobserved" or _has_no_end(subject):
        reasons = " ".join(diagnosis.summary.incomplete)
        raise AssertionError(f"The run was not watched to its end. {reasons}")


def _has_no_end(subject: object) -> bool:
    """Whether a recording is damaged, or its script was killed or is still running."""
    from divergence_probe.record.reader import Recording
    from divergence_probe.replay import is_end_known

    if not isinstance(subject, Recording):
        return False
    return bool(subject.damage) or not is_end_known(subject)


def _diagnosis_of(
    subject: object, selection: Selection, thresholds: Mapping[str, float] | None
) -> Diagnosis:
    from divergence_probe.diagnosis.diagnosis import Diagnosis
    from divergence_probe.probe import Probe, attach
    from divergence_probe.record.reader import Recording
    from divergence_probe.replay import replay

    if isinstance(subject, Probe):  # before the callables: it is one, as a decorator
        subject = subject.recording if thresholds else subject.diagnosis
    elif callable(subject) and not isinstance(subject, Recording | Diagnosis):
        with attach(thresholds=thresholds) as probe:
            subject()
        return _kept(probe.diagnosis, selection)
    if isinstance(subject, Recording):
        return replay(subject, selection, thresholds)
    if not isinstance(subject, Diagnosis):
        raise UsageError(
            f"assert_no_divergence got {type(subject).__name__}: give it a probe, a recording or "
            "its folder, a diagnosis, or a function to run."
        )
    return _kept(subject, selection)


def _kept(diagnosis: Diagnosis, selection: Selection) -> Diagnosis:
    """The diagnosis with the findings that count only, and the root cause among those."""
    from divergence_probe.diagnosis.root_cause import root_cause

    findings = tuple(filter(selection.keeps, diagnosis.findings))
    if len(findings) == len(diagnosis.findings):
        return diagnosis
    return replace(diagnosis, findings=findings, root_cause=root_cause(findings))


def _failed(diagnosis: Diagnosis, failing: list[Finding]) -> str:
    """Everything a person needs to act on, in the order of the reports."""
    from divergence_probe.report.wording import count_of, facts, site_of

    cause = diagnosis.root_cause
    lead = failing[0] if cause is None else diagnosis.findings[cause.findings[0]]
    fix = cause.fix if cause is not None else lead.fix
    why = f"{cause.summary} ({cause.cause}, {cause.confidence})" if cause else lead.message
    sites = dict.fromkeys(filter(None, map(site_of, [lead, *failing])))
    lines = [f"inner loops: {diagnosis.verdict} ({', '.join(facts(diagnosis))})", ""]
    lines += [f"Why    {why}", *[f"Where  {site}" for site in sites][:3]]
    lines += [_indented("Fix    ", fix)] if fix else []
    lines += [f"Norm   {text}" for text in _norms(diagnosis.norms)]
    lines += ["", f"{count_of(len(failing), 'finding')}:"]
    lines += [
        f"  {f.rule} {f.severity.label} {f.message}" + (f" (×{f.count})" if f.count > 1 else "")
        for f in failing
    ]
    codes = ", ".join(repr(code) for code in dict.fromkeys(f.rule for f in failing))
    lines += ["", f"`probe rule {lead.rule}` explains. If this is meant: ignore=[{codes}]."]
    return "\n".join(lines)


def _norms(traces: tuple[NormTrace, ...]) -> list[str]:
    """The two parameters that grew most, before and after the task."""
    from divergence_probe.report.numbers import brief

    def growth(trace: NormTrace) -> float:
        ratio = trace.norms[-1] / trace.norms[0] if trace.norms[0] else float("inf")
        return float("inf") if ratio != ratio else ratio  # nan is the worst of all

    worst = sorted((trace for trace in traces if len(trace.norms) > 1), key=growth)[::-1][:2]
    return [
        f"{trace.layer} ‖w‖ {brief(trace.norms[0])} → {brief(trace.norms[-1])} in "
        f"{len(trace.norms) - 1} steps (task {trace.task})"
        for trace in worst
    ]


def _indented(label: str, text: str) -> str:
    return label + ("\n" + " " * len(label)).join(text.splitlines())


def _unobserved() -> str:
    from divergence_probe.report.wording import UNOBSERVED_ADVICE

    return "\n".join(
        ("No inner step was seen, so nothing is known to be healthy.", *UNOBSERVED_ADVICE)
    )
