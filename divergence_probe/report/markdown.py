"""Markdown for pull-request comments and ``$GITHUB_STEP_SUMMARY``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.report import numbers, wording
from divergence_probe.report.source import Frame, frames
from divergence_probe.report.wording import one_line, visible

FORMAT = "markdown"
_SIGNS = {"diverged": "🔴", "suspect": "🟡", "healthy": "🟢", "unobserved": "⚪"}
_SPECIAL = re.compile(r"([\\`*_\[\]#|~$])")
_ROWS = 8


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """The report in GitHub's Markdown: the answer in the open, the evidence folded away."""
    verdict = diagnosis.verdict
    parts = [f"### {_SIGNS[verdict]} {verdict.capitalize()}: {wording.verdict_meaning(diagnosis)}"]
    parts.append(" · ".join(map(_escaped, wording.facts(diagnosis))))
    parts += _answer(diagnosis)
    parts += [_excerpt(frame) for frame in frames(wording.story(diagnosis))]
    parts += _fix(diagnosis)
    parts += _findings(diagnosis)
    if diagnosis.norms:
        title = "Norms by inner step"
        parts.append(_folded(title, _norms(diagnosis), opened=verdict == "diverged"))
    parts += (
        [_folded("BatchNorm statistics", _batch_norm(diagnosis))] if diagnosis.batch_norm else []
    )
    parts += [
        f"> **Incomplete.** {_escaped(sentence)}" for sentence in diagnosis.summary.incomplete
    ]
    return "\n\n".join(parts) + "\n"


def _answer(diagnosis: Diagnosis) -> list[str]:
    parts = [f"**Why.** {_escaped(wording.why(diagnosis))}"] if wording.why(diagnosis) else []
    if diagnosis.root_cause is not None:
        sure = _escaped(wording.confidence_words(diagnosis).replace("`", ""))
        parts.append(f"**Cause.** {_code(diagnosis.root_cause.cause)}, {sure}")
    if diagnosis.exception is not None:
        words = f"**Raised.** {_escaped(wording.raised(diagnosis))}"
        parts.insert(0 if wording.raised_first(diagnosis) else len(parts), words)
    parts += [wording.unseen(diagnosis)] if wording.unseen(diagnosis) else []
    advice = wording.advice(diagnosis)
    return parts + [f"- {_escaped(sentence.replace('`', ''))}" for sentence in advice]


def _fix(diagnosis: Diagnosis) -> list[str]:
    fix = visible(wording.fix(diagnosis)).strip()
    return ["**Fix**\n\n" + _fenced(fix, "python")] if fix else []


def _excerpt(frame: Frame) -> str:
    width = max((len(str(line.number)) for line in frame.lines), default=1)
    rows = []
    for line in frame.lines:
        rows.append(f"{line.number:>{width}} | {line.code}")
        rows += [f"{' ' * width} | {' ' * line.indent}^-- {text}" for text in line.texts]
    told = [f"- {_code(site)} {_escaped(text)}" for site, text in frame.unread]
    shown = [f"{_code(frame.site)}\n\n" + _fenced("\n".join(rows), "text")] if rows else []
    return "\n\n".join([*shown, *(["\n".join(told)] if told else [])])


def _findings(diagnosis: Diagnosis) -> list[str]:
    folded = wording.by_rule(diagnosis.findings)
    if not folded:
        return []
    rows = [
        [
            finding.severity.label,
            _code(finding.rule),
            wording.seen(finding, count) or "once",
            _escaped(finding.message),
            _code(wording.site_of(finding) or ""),
        ]
        for finding, count in folded
    ]
    return [_table(["severity", "rule", "seen", "message", "where"], rows)]


def _norms(diagnosis: Diagnosis) -> str:
    shown = numbers.by_growth(diagnosis.norms)[:_ROWS]
    span = numbers.log_span([trace.norms for trace in shown])
    rows = [
        [
            _code(trace.layer),
            str(trace.task),
            numbers.compact(trace.norms[0]),
            numbers.compact(trace.norms[-1]),
            numbers.growth_words(trace.norms),
            numbers.sparkline(trace.norms, span),
        ]
        for trace in shown
        if trace.norms
    ]
    table = _table(["parameter", "task", "before", "after", "growth", "steps"], rows)
    more = len(diagnosis.norms) - len(shown)
    return table + (f"\n\nand {more} more" if more else "")


def _batch_norm(diagnosis: Diagnosis) -> str:
    shown = numbers.by_distance(diagnosis.batch_norm)[:_ROWS]
    rows = [
        [
            _code(row.layer),
            _escaped(numbers.mode_words(row)),
            "–" if row.batches_seen is None else str(row.batches_seen),
            "–" if math.isnan(row.mean_distance) else f"{numbers.brief(row.mean_distance)} σ",
            "–" if math.isnan(row.variance_ratio) else numbers.times(row.variance_ratio),
            _escaped(row.base_buffers),
        ]
        for row in shown
    ]
    table = _table(["layer", "mode", "batches seen", "mean off by", "variance", "buffers"], rows)
    return "\n\n".join([table, *map(_escaped, numbers.mode_notes(shown))])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _folded(title: str, body: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{title}</summary>\n\n{body}\n\n</details>"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no mention, no issue link."""
    entities = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", entities).replace("@", "@\u2060").replace("://", ":\u2060//")


def _code(text: str) -> str:
    """A code span around any text; ``|`` is written as it must be inside tables."""
    text = one_line(text).replace("|", "\\|")
    if not text:
        return ""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(code: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"
