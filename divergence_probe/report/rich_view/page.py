"""The order of answers: verdict, why, where, what to change, how sure; then the evidence."""

from __future__ import annotations

from rich.cells import cell_len
from rich.text import Text

from divergence_probe.diagnosis.diagnosis import Diagnosis, Health
from divergence_probe.report import wording
from divergence_probe.report.rich_view import tables
from divergence_probe.report.rich_view.frames import story_lines
from divergence_probe.report.rich_view.layout import (
    VERDICT_STYLES,
    code_lines,
    flowed,
    heading,
    labelled,
    wrapped,
)
from divergence_probe.report.source import frames
from divergence_probe.report.vitals import health_rows, next_commands, watched
from divergence_probe.report.wording import one_line, visible

_NARROWEST, _WIDEST = 40, 120
_GRADES = {"good": "green", "doubtful": "yellow", "grave": "red", "unknown": "dim"}


def page(diagnosis: Diagnosis, width: int) -> list[Text]:
    """The whole report as lines of at most ``width`` cells, kept between 40 and 120."""
    width = min(max(_NARROWEST, width), _WIDEST)
    sections = [
        _header(diagnosis, width),
        _why(diagnosis, width),
        _where(diagnosis, width),
        _fix(diagnosis, width),
        _sure(diagnosis, width),
        _advice(diagnosis, width),
        _health(diagnosis, width),
        _norms(diagnosis, width),
        _batch_norm(diagnosis, width),
        _findings(diagnosis, width),
        _incomplete(diagnosis, width),
        _next(diagnosis, width),
    ]
    lines: list[Text] = []
    for section in filter(None, sections):
        lines += ([Text("")] if lines else []) + section
    return lines


def _header(diagnosis: Diagnosis, width: int) -> list[Text]:
    badge = Text(" ") + Text(
        f" {diagnosis.verdict.upper()} ", style=VERDICT_STYLES[diagnosis.verdict]
    )
    indent = badge.cell_len + 2
    facts = flowed([Text(fact) for fact in wording.facts(diagnosis)], width, " " * indent)
    return [badge + Text("  ") + facts[0][indent:], *facts[1:]]


def _why(diagnosis: Diagnosis, width: int) -> list[Text]:
    paragraphs = [Text(one_line(wording.why(diagnosis)))] if wording.why(diagnosis) else []
    error = diagnosis.exception
    if error is not None:
        words = Text(_short(one_line(wording.raised(diagnosis)), 600))
        words.stylize("bold red", 0, len(one_line(error.type)))
        # What ended the run comes first, unless the root cause already explains it.
        paragraphs.insert(0 if wording.raised_first(diagnosis) else len(paragraphs), words)
    if wording.unseen(diagnosis):
        paragraphs.append(Text(wording.unseen(diagnosis)))
    return labelled("Why", paragraphs, width)


def _where(diagnosis: Diagnosis, width: int) -> list[Text]:
    shown = frames(wording.story(diagnosis))
    sure = diagnosis.root_cause is not None and diagnosis.root_cause.confidence == "confirmed"
    conclusion = Text(wording.confidence_words(diagnosis), style="green") if sure else None
    return story_lines(shown, width, conclusion) if shown else []


def _fix(diagnosis: Diagnosis, width: int) -> list[Text]:
    fix = visible(wording.fix(diagnosis)).rstrip()
    return (
        labelled("Fix", [Text(line, style="green") for line in code_lines(fix, width - 7)], width)
        if fix
        else []
    )


def _sure(diagnosis: Diagnosis, width: int) -> list[Text]:
    words = wording.confidence_words(diagnosis)
    cause = diagnosis.root_cause
    lines: list[Text] = []
    if cause is not None:
        style = "green" if cause.confidence == "confirmed" else "yellow"
        if cause.confidence == "confirmed" and wording.story(diagnosis):
            words = "confirmed"  # the frame above says how
        name = Text(one_line(cause.cause), style="bold") + Text(", ") + Text(words, style=style)
        lines = labelled("Cause", [name], width)
    if diagnosis.interventions:
        lines += tables.intervention_table(diagnosis.interventions, width)
    return lines


def _advice(diagnosis: Diagnosis, width: int) -> list[Text]:
    lines: list[Text] = []
    for number, sentence in enumerate(wording.advice(diagnosis)):
        lines += labelled(
            "Try" if number == 0 else "", wrapped(Text(sentence), width - 9, "· "), width
        )
    return lines


def _health(diagnosis: Diagnosis, width: int) -> list[Text]:
    """The numbers that make silence evidence; beside a suspicion they narrow it down."""
    if diagnosis.verdict not in ("healthy", "suspect") or not diagnosis.summary.inner_steps:
        return []
    if diagnosis.verdict == "suspect" and diagnosis.health == Health():
        return []
    lines = heading("How well it behaved", width, watched(diagnosis))
    vitals = health_rows(diagnosis)
    room = max(14, *(cell_len(vital.value) + 1 for vital in vitals))
    for label, value, grade, meaning in vitals:
        start = (
            Text("   ")
            + Text(f"{label:<14}", style="bold")
            + Text(f"{value:<{room}}", style=_GRADES[grade])
        )
        body = wrapped(Text(meaning, style="dim"), width - start.cell_len - 1)
        lines += [
            (start if n == 0 else Text(" " * start.cell_len)) + Text(" ") + line
            for n, line in enumerate(body)
        ]
    return lines


def _norms(diagnosis: Diagnosis, width: int) -> list[Text]:
    if not diagnosis.norms:
        return []
    tasks = {trace.task for trace in diagnosis.norms}
    note = f"task {tasks.pop()}" if len(tasks) == 1 else "worst task of each"
    limit = 4 if diagnosis.verdict == "healthy" else 8
    return heading("Norm ‖w‖ by inner step", width, note) + tables.norm_table(
        diagnosis.norms, width, limit
    )


def _batch_norm(diagnosis: Diagnosis, width: int) -> list[Text]:
    if not diagnosis.batch_norm:
        return []
    limit = 4 if diagnosis.verdict == "healthy" else 6
    note = "running statistics against the batch's own, the worst of the run"
    return heading("BatchNorm", width, note) + tables.batch_norm_table(
        diagnosis.batch_norm, width, limit
    )


def _findings(diagnosis: Diagnosis, width: int) -> list[Text]:
    if not diagnosis.findings:
        return []
    lines = heading("Findings", width, wording.tally(diagnosis.findings))
    return lines + tables.findings_list(wording.by_rule(diagnosis.findings), width, 10)


def _incomplete(diagnosis: Diagnosis, width: int) -> list[Text]:
    if not diagnosis.summary.incomplete:
        return []
    lines = [Text(" ") + Text("Incomplete", style="bold yellow")]
    for sentence in diagnosis.summary.incomplete:
        lines += wrapped(Text(one_line(sentence)), width, "   · ")
    return lines


def _next(diagnosis: Diagnosis, width: int) -> list[Text]:
    """Where the recording is and the commands that go on from here."""
    commands = next_commands(diagnosis)
    if not commands and not diagnosis.recording:
        return []
    saved = [Text(one_line(diagnosis.recording))] if diagnosis.recording else []
    lines = labelled("Saved", saved, width)
    return lines + labelled("Next", [Text(command, style="cyan") for command in commands], width)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
