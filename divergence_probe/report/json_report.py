"""The JSON report of the contract: strict JSON, non-finite numbers as strings, stable key order."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.rules.finding import Finding
from divergence_probe.version import __version__

FORMAT = "json"
SCHEMA_VERSION = 1
_SURROGATE = re.compile("[\ud800-\udfff]")


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """The report as JSON text in ASCII, so that any stream and any strict parser takes it."""
    return json.dumps(to_dict(diagnosis), indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """Plain dicts, lists, strings and finite numbers, keys in the contract's order."""
    summary, cause, raised = diagnosis.summary, diagnosis.root_cause, diagnosis.exception
    told: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "divergence-probe", "version": tool_version()},
        "script_exit": diagnosis.script_exit,
        "exception": None
        if raised is None
        else {"type": raised.type, "message": raised.message, "inner_loop": raised.inner_loop},
        "verdict": diagnosis.verdict,
        "summary": {
            "tasks": summary.tasks,
            "inner_steps": summary.inner_steps,
            "layers": summary.layers,
            "adapters": list(summary.adapters),
            "overhead_fraction": summary.overhead_fraction,
            "ranks": summary.ranks,
        },
        "root_cause": None
        if cause is None
        else {
            "cause": cause.cause,
            "confidence": cause.confidence,
            "summary": cause.summary,
            "fix": cause.fix,
            "findings": list(cause.findings),
        },
        "findings": [_finding(finding) for finding in diagnosis.findings],
    }
    if diagnosis.interventions:  # only --confirm makes any
        told["interventions"] = [asdict(run) for run in diagnosis.interventions]
    plain: dict[str, Any] = _plain(told)
    return plain


def tool_version() -> str:
    """The version of the tool."""
    return __version__


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "name": finding.name,
        "cause": finding.cause,
        "severity": finding.severity.label,
        "layer": finding.layer,
        "task": finding.task,
        "step": finding.step,
        "phase": finding.phase,
        "rank": finding.rank,
        "count": finding.count,
        "message": finding.message,
        "evidence": dict(finding.evidence),
        "fix": finding.fix,
    }


def _plain(value: object) -> Any:
    """``value`` as JSON's own types; numpy scalars become Python numbers."""
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    return _text(str(value))


def _text(text: str) -> str:
    # A lone surrogate (from a file name that is not UTF-8) is no character: strict parsers
    # reject its escape.
    return _SURROGATE.sub("\ufffd", text)
