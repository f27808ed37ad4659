"""GitHub workflow commands: findings as annotations on the lines of a pull request.

https://docs.github.com/en/actions/writing-workflows/choosing-what-your-workflow-does/workflow-commands-for-github-actions
"""

from __future__ import annotations

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.report.concise import verdict_line
from divergence_probe.report.wording import (
    fix,
    one_line,
    place,
    posix_path,
    raised,
    ranked,
    seen,
    split_site,
    story,
    visible,
    why,
)
from divergence_probe.rules.finding import Finding, Severity

FORMAT = "github"
_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """One workflow command a finding, gravest first, after one for the verdict.

    GitHub shows ten annotations of each kind for a step; so the order matters.
    """
    lines = [_verdict(diagnosis)]
    lines += [_annotation(finding) for finding in ranked(diagnosis.findings)]
    return "\n".join(lines) + "\n"


def _verdict(diagnosis: Diagnosis) -> str:
    if diagnosis.verdict == "healthy":
        return verdict_line(diagnosis)
    marks = story(diagnosis)
    text = "\n".join(
        filter(None, [why(diagnosis), raised(diagnosis), fix(diagnosis), verdict_line(diagnosis)])
    )
    command = {"diverged": "error", "suspect": "warning"}.get(diagnosis.verdict, "notice")
    return _command(
        command, marks[0].site if marks else None, f"divergence-probe: {diagnosis.verdict}", text
    )


def _annotation(finding: Finding) -> str:
    times = f" ({seen(finding)})" if seen(finding) else ""
    where = f"at {place(finding)}" if place(finding) else ""
    text = "\n".join(filter(None, [finding.message + times, where, finding.fix]))
    site = finding.marks[0].site if finding.marks else None
    return _command(_COMMANDS[finding.severity], site, f"{finding.rule} {finding.name}", text)


def _command(command: str, site: str | None, title: str, message: str) -> str:
    properties = []
    if site is not None:
        path, line = split_site(site)
        properties.append(f"file={_property(posix_path(path))}")
        properties += [f"line={line}"] if line is not None else []
    properties.append(f"title={_property(one_line(title))}")
    return f"::{command} {','.join(properties)}::{_data(visible(message))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(visible(text)).replace(":", "%3A").replace(",", "%2C")
