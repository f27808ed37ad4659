"""A few words under the user's own traceback, where an exception came out of an inner loop."""

from __future__ import annotations

import textwrap

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.rules import raised_explanations
from divergence_probe.rules.finding import Finding

_WIDTH = 88


def explain(error: BaseException, diagnosis: Diagnosis) -> str | None:
    """What the exception means for the inner loop, ready to print; None for nothing to say.

    Args:
        error: what ended the script.
        diagnosis: of the run up to there.
    """
    raised = diagnosis.exception
    if raised is None or not raised.inner_loop or not isinstance(error, Exception):
        return None
    finding = next((f for f in diagnosis.findings if f.rule == "EX001"), None)
    lines = [f"probe: {raised.type} was raised inside an inner loop{_where(finding, diagnosis)}."]
    known = raised_explanations.explain(raised.message)
    meaning = known.meaning if known is not None else ""
    fix = known.fix if known is not None else ""
    if finding is not None and finding.fix:  # it also knows the layer and the parameters
        meaning, fix = finding.message, finding.fix
    lines += textwrap.wrap(meaning, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    for number, line in enumerate(fix.splitlines()):
        lines.append(f"  {'Fix: ' if number == 0 else '     '}{line}")
    return "\n".join(lines)


def _where(finding: Finding | None, diagnosis: Diagnosis) -> str:
    done = diagnosis.summary.inner_steps
    before = f"{done:,} inner step{'s' * (done != 1)} taken before it"
    if finding is None:
        return f" ({before})"
    at = f", layer {finding.layer}" if finding.layer else ""
    return f" (task {finding.task}, step {finding.step}{at}; {before})"
