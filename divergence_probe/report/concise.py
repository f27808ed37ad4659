"""One line a finding, as linters print them, and one line for the verdict."""

from __future__ import annotations

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.report.wording import (
    count_of,
    facts,
    one_line,
    place,
    raised,
    ranked,
    seen,
    site_of,
    tally,
)

FORMAT = "concise"


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """``path:line: CODE severity message`` for each finding, gravest first; then the verdict."""
    lines = []
    for finding in ranked(diagnosis.findings):
        times = f" ({seen(finding)})" if seen(finding) else ""
        where = site_of(finding) or place(finding) or "run"
        message = one_line(finding.message)
        lines.append(
            f"{one_line(where)}: {one_line(finding.rule)} {finding.severity.label} {message}{times}"
        )
    if diagnosis.exception is not None:
        lines.append(one_line(f"{diagnosis.exception.site or 'run'}: {raised(diagnosis)}"))
    return "\n".join([*lines, verdict_line(diagnosis)]) + "\n"


def verdict_line(diagnosis: Diagnosis) -> str:
    """The whole verdict in one line."""
    parts = [tally(diagnosis.findings)] if diagnosis.findings else []
    if diagnosis.root_cause is not None:
        parts.insert(
            0, f"{one_line(diagnosis.root_cause.cause)} ({diagnosis.root_cause.confidence})"
        )
    parts.append(
        ", ".join(facts(diagnosis)) if diagnosis.summary.inner_steps else count_of(0, "inner step")
    )
    if diagnosis.summary.incomplete:
        parts.append(f"incomplete: {' '.join(map(one_line, diagnosis.summary.incomplete))}")
    return f"{diagnosis.verdict}: {'; '.join(parts)}"
