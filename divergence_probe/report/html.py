"""The HTML report: one self-contained file, nothing loaded from anywhere, no script."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence_probe.diagnosis.diagnosis import Diagnosis, NormTrace
from divergence_probe.report import charts, numbers, wording
from divergence_probe.report.json_report import tool_version
from divergence_probe.report.source import frames
from divergence_probe.report.vitals import health_rows, next_commands, watched

if TYPE_CHECKING:
    from jinja2 import Environment

FORMAT = "html"
_TEMPLATES = Path(__file__).parent / "templates"
_TABLE_ROWS, _TABLE_STEPS, _FINDINGS_A_RULE = 200, 8, 50


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """The report as a whole HTML document."""
    return _drawn("page.html.jinja", diagnosis)


def fragment(diagnosis: Diagnosis) -> str:
    """The report as one element with its own style, for notebooks and other pages."""
    return _drawn("fragment.html.jinja", diagnosis)


def _drawn(template: str, diagnosis: Diagnosis) -> str:
    return _environment().get_template(template).render(_context(diagnosis)).strip() + "\n"


@functools.cache
def _environment() -> Environment:
    # jinja2 is imported only by those who ask for HTML.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every value passes here: control characters and lone surrogates never reach the file.
        finalize=lambda value: wording.visible(value) if type(value) is str else value,
    )
    environment.filters.update(
        compact=numbers.compact,
        brief=numbers.brief,
        times=numbers.times,
        one_line=wording.one_line,
        place=wording.place,
        site=wording.site_of,
        modes=numbers.mode_words,
        growth_words=numbers.growth_words,
        grave=numbers.is_grave,
        step_name=charts.step_name,
        evidence=_evidence,
        isnan=math.isnan,
    )
    return environment


def _context(diagnosis: Diagnosis) -> dict[str, Any]:
    traces = numbers.by_growth(diagnosis.norms)[:_TABLE_ROWS]
    return {
        "d": diagnosis,
        "meaning": wording.verdict_meaning(diagnosis),
        "facts": wording.facts(diagnosis),
        "raised_first": wording.raised_first(diagnosis),
        "why": wording.why(diagnosis),
        "fix": wording.fix(diagnosis).strip(),
        "sure": wording.confidence_words(diagnosis),
        "frames": frames(wording.story(diagnosis)),
        "advice": wording.advice(diagnosis),
        "unseen": wording.unseen(diagnosis),
        "raised_where": wording.raised_where(diagnosis),
        "vitals": health_rows(diagnosis),
        "watched": watched(diagnosis),
        "norm_chart": charts.norm_chart(diagnosis.norms),
        "traces": traces,
        "steps": _steps(traces),
        "first": numbers.first_to_grow(diagnosis.norms),
        "more_traces": len(diagnosis.norms) - len(traces),
        "distance_chart": charts.distance_chart(diagnosis.batch_norm),
        "batch_norm": numbers.by_distance(diagnosis.batch_norm)[:_TABLE_ROWS],
        "mode_notes": numbers.mode_notes(numbers.by_distance(diagnosis.batch_norm)[:_TABLE_ROWS]),
        "rules": _rules(diagnosis),
        "tally": wording.tally(diagnosis.findings),
        "commands": next_commands(diagnosis),
        "version": tool_version(),
    }


def _steps(traces: list[NormTrace]) -> list[int]:
    return sorted(numbers.telling_steps(traces)[:_TABLE_STEPS])


def _rules(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Findings folded by rule, each with its single findings beneath."""
    rules = []
    for telling, count in wording.by_rule(diagnosis.findings):
        single = [finding for finding in diagnosis.findings if finding.rule == telling.rule]
        rules.append(
            {
                "telling": telling,
                "seen": wording.seen(telling, count),
                "single": single[:_FINDINGS_A_RULE],
                "more": max(0, len(single) - _FINDINGS_A_RULE),
            }
        )
    return rules


def _evidence(value: object) -> str:
    return numbers.compact(value) if isinstance(value, float) else str(value)
