"""SARIF 2.1.0, for code scanning and editors.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.report.json_report import to_dict, tool_version
from divergence_probe.report.wording import (
    by_rule,
    place,
    posix_path,
    split_site,
    story,
    visible,
)
from divergence_probe.rules.finding import Finding, Mark, Severity

FORMAT = "sarif"
_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """The findings as one SARIF run; paths inside the working directory are relative to it."""
    return json.dumps(to_sarif(diagnosis), indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def to_sarif(diagnosis: Diagnosis) -> dict[str, Any]:
    """The SARIF log as plain dicts and lists."""
    folded = [finding for finding, _ in by_rule(diagnosis.findings)]
    index = {finding.rule: number for number, finding in enumerate(folded)}
    report = to_dict(diagnosis)
    documented = _documentation() if folded else {}
    marks = story(diagnosis)
    results = [
        _result(finding, index[finding.rule], evidence["evidence"], marks)
        for finding, evidence in zip(diagnosis.findings, report["findings"], strict=True)
    ]
    driver = {
        "name": "divergence-probe",
        "version": tool_version(),
        "rules": [_rule(finding, documented.get(finding.rule, {})) for finding in folded],
    }
    invocation = {
        "executionSuccessful": diagnosis.exception is None and diagnosis.script_exit == 0,
        "exitCode": diagnosis.script_exit,
    }
    kept = ("verdict", "summary", "root_cause")
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "invocations": [invocation],
                "originalUriBaseIds": {
                    "SRCROOT": {"description": {"text": "the working directory of the run"}}
                },
                "results": results,
                "properties": {key: report[key] for key in kept},
            }
        ],
    }


def _rule(finding: Finding, documentation: Mapping[str, str]) -> dict[str, Any]:
    code, name = visible(finding.rule), visible(finding.name)
    summary = documentation.get("", "") or visible(finding.message)
    sections = [(title, text) for title, text in documentation.items() if title and text]
    if not sections:
        sections = [("Cause", visible(finding.cause))] if finding.cause else []
        sections += [("What to change", visible(finding.fix))] if finding.fix else []
    more = f"`probe rule {code}` explains the rule in full."
    plain = [f"{title}: {text}" for title, text in sections]
    marked = [f"## {title}\n{text}" for title, text in sections]
    return {
        "id": code,
        "name": "".join(part.capitalize() for part in name.split("-")),
        "shortDescription": {"text": name.replace("-", " ")},
        "fullDescription": {"text": summary},
        "help": {
            "text": "\n\n".join([summary, *plain, more]),
            "markdown": "\n\n".join([summary, *marked, more] if documentation else [more]),
        },
        "defaultConfiguration": {"level": _LEVELS[finding.severity]},
    }


def _documentation() -> dict[str, dict[str, str]]:
    """Each rule's documentation by code; empty where the rules cannot be loaded here."""
    try:
        from divergence_probe.rules.registry import all_rules

        return {rule.code: rule.documentation() for rule in all_rules()}
    except Exception:  # a broken third-party rule must not cost the report
        return {}


def _result(
    finding: Finding, rule: int, evidence: dict[str, Any], story_marks: tuple[Mark, ...]
) -> dict[str, Any]:
    text = visible(finding.message)
    text += f"\nFix: {visible(finding.fix)}" if finding.fix else ""
    # Code scanning drops a result without a file; the story's first line is the next best place.
    marks = finding.marks or story_marks[:1]
    location = _location(marks[0]) if marks else {}
    if finding.layer:
        logical = {"fullyQualifiedName": visible(finding.layer), "kind": "member"}
        location["logicalLocations"] = [logical]
    result: dict[str, Any] = {
        "ruleId": visible(finding.rule),
        "ruleIndex": rule,
        "level": _LEVELS[finding.severity],
        "message": {"text": text},
        "locations": [location] if location else [],
        "occurrenceCount": max(1, finding.count),
        "partialFingerprints": {"divergenceProbe/v1": _fingerprint(finding)},
        "properties": {
            "cause": finding.cause and visible(finding.cause),
            "place": place(finding),
            "evidence": evidence,
        },
    }
    if len(marks) > 1:
        related = [{"id": number, **_location(mark)} for number, mark in enumerate(marks[1:], 1)]
        result["relatedLocations"] = [
            {**place_, "message": {"text": visible(mark.text)}}
            for place_, mark in zip(related, marks[1:], strict=True)
        ]
    return result


def _location(mark: Mark) -> dict[str, Any]:
    path, line = split_site(mark.site)
    physical: dict[str, Any] = {"artifactLocation": _artifact(posix_path(path))}
    if line:
        physical["region"] = {"startLine": line}
    return {"physicalLocation": physical}


def _artifact(path: str) -> dict[str, str]:
    if Path(path).is_absolute():
        return {"uri": "file://" + quote("/" + visible(path).lstrip("/"))}
    return {"uri": quote(visible(path)), "uriBaseId": "SRCROOT"}


def _fingerprint(finding: Finding) -> str:
    """The same for the same rule at the same layer and file, also after lines have moved."""
    path = split_site(finding.marks[0].site)[0] if finding.marks else ""
    parts = "\n".join([finding.rule, finding.layer or "", posix_path(path)])
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:32]
