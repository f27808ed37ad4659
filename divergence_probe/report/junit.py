"""JUnit XML: one test case for the verdict and one for each rule that found something.

An error fails its case and a warning only speaks in its output, so that a CI that turns red on a
failed case agrees with the default of ``--fail-on error``. The verdict fails where an inner loop
diverged, is an error where an exception ended the script, and is skipped where nothing was seen.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.report.concise import verdict_line
from divergence_probe.report.wording import (
    advice,
    by_rule,
    fix,
    place,
    raised,
    seen,
    site_of,
    verdict_meaning,
    visible,
    why,
)
from divergence_probe.rules.finding import Finding, Severity

FORMAT = "junit"
_SUITE = "divergence-probe"
# XML 1.0, section 2.2: every other character makes the document ill-formed, even as a reference.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """The report as one JUnit test suite."""
    cases = [_verdict_case(diagnosis)]
    cases += [
        _rule_case(diagnosis, finding, count) for finding, count in by_rule(diagnosis.findings)
    ]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {
        "name": _SUITE,
        **{name: str(count) for name, count in counts.items()},
        "time": f"{diagnosis.summary.seconds:.3f}",
    }
    suites = ElementTree.Element("testsuites", attributes)
    ElementTree.SubElement(suites, "testsuite", attributes).extend(cases)
    ElementTree.indent(suites)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + ElementTree.tostring(suites, encoding="unicode")
        + "\n"
    )


def _verdict_case(diagnosis: Diagnosis) -> ElementTree.Element:
    case = _case("verdict", diagnosis.verdict)
    case.set("time", f"{diagnosis.summary.seconds:.3f}")  # cases of rules take none of it
    words = "\n".join(filter(None, [why(diagnosis), fix(diagnosis), verdict_line(diagnosis)]))
    error = diagnosis.exception
    if error is not None:
        _child(case, "error", f"{raised(diagnosis)}\n{words}", error.message, error.type)
    elif diagnosis.verdict == "diverged":
        _child(case, "failure", words, why(diagnosis) or "an inner loop diverged", "diverged")
    elif diagnosis.verdict == "unobserved":
        _child(case, "skipped", "\n".join([words, *advice(diagnosis)]), verdict_meaning(diagnosis))
    else:
        _child(case, "system-out", words)
    return case


def _rule_case(diagnosis: Diagnosis, telling: Finding, count: int) -> ElementTree.Element:
    case = _case("rules", f"{telling.rule} {telling.name}")
    lines = [f"seen: {seen(telling, count) or 'once'}"]
    for finding in diagnosis.findings:
        if finding.rule == telling.rule:
            where = ", ".join(filter(None, [site_of(finding), place(finding)]))
            lines += [
                f"{finding.severity.label}: {finding.message}" + (f" [{where}]" if where else "")
            ]
            lines += [f"fix: {finding.fix}"] if finding.fix else []
    if telling.severity is Severity.ERROR:
        _child(case, "failure", "\n".join(lines), telling.message, telling.cause or telling.name)
    else:
        _child(case, "system-out", "\n".join(lines))
    return case


def _case(group: str, name: str) -> ElementTree.Element:
    return ElementTree.Element(
        "testcase", {"classname": f"{_SUITE}.{group}", "name": _legal(name), "time": "0"}
    )


def _child(
    case: ElementTree.Element, tag: str, text: str, message: str = "", kind: str = ""
) -> None:
    child = ElementTree.SubElement(case, tag)
    if message:
        child.set("message", _legal(message))
    if kind:
        child.set("type", _legal(kind))
    child.text = _legal(text)


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", visible(text))
