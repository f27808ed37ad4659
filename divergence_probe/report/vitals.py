"""How well a run behaved and what to do next, in words: for the terminal and the HTML report."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import NamedTuple

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.report import numbers, wording
from divergence_probe.report.wording import one_line


class Vital(NamedTuple):
    """One number of :class:`Health`.

    ``grade`` is ``"good"``, ``"doubtful"``, ``"grave"`` or ``"unknown"``; ``meaning`` says what
    the number is.
    """

    label: str
    value: str
    grade: str
    meaning: str


def health_rows(diagnosis: Diagnosis) -> list[Vital]:
    """The numbers that make silence evidence; those not measured say so."""
    health = diagnosis.health
    margin = health.instability_margin
    return [
        _growth(diagnosis),
        Vital("stability", *_graded(margin, lambda value: f"{numbers.brief(value)} of 2", 1.5, 2.0),
              "step size × curvature; steps grow from 2 on"),
        *_statistics(diagnosis),
        Vital("support loss", *_loss(health.support_loss), "mean over tasks, first to last step"),
    ]  # fmt: skip


def _growth(diagnosis: Diagnosis) -> Vital:
    health = diagnosis.health
    if health.largest_growth is None and diagnosis.norms:
        return Vital("growth", "from 0", "unknown", "the weights adapted begin at 0, or next to it")
    of = f" ({one_line(health.largest_growth_layer)})" if health.largest_growth_layer else ""
    words = _graded(health.largest_growth, numbers.times, 2.0, numbers.GRAVE_GROWTH)
    rest = "; small parameters left out" if _small_ones_grew_more(diagnosis) else ""
    return Vital("growth", *words, f"largest norm after a task over before it{of}{rest}")


def _small_ones_grew_more(diagnosis: Diagnosis) -> bool:
    """Whether the table of norms shows larger growth, of what has little of the model's norm."""
    most = diagnosis.health.largest_growth
    grown = (numbers.growth(trace.norms) for trace in diagnosis.norms)
    return most is not None and any(growth > 1.01 * most for growth in grown)


def _statistics(diagnosis: Diagnosis) -> list[Vital]:
    """How far running statistics in use were; nothing for a run without BatchNorm."""
    distance = diagnosis.health.running_statistics_distance
    modes = [mode for row in diagnosis.batch_norm for mode in row.modes.values()]
    if distance is None and not modes:
        return []
    if distance is None and not any("eval" in mode for mode in modes):
        meaning = "BatchNorm ran in train mode only, on each batch's own statistics"
        return [Vital("statistics", "not used", "unknown", meaning)]
    words = _graded(
        distance,
        lambda value: f"{numbers.brief(value)} σ",
        numbers.DOUBTFUL_DISTANCE,
        numbers.GRAVE_DISTANCE,
    )
    return [Vital("statistics", *words, "running mean off the batch's own, in eval mode")]


def _graded(
    value: float | None, words: Callable[[float], str], doubtful: float, grave: float
) -> tuple[str, str]:
    if value is None:
        return "not measured", "unknown"
    # nan is grave: it compares false with every bound.
    return words(
        value
    ), "grave" if not value < grave else "doubtful" if value >= doubtful else "good"


def _loss(losses: tuple[float, float] | None) -> tuple[str, str]:
    if losses is None:
        return "not measured", "unknown"
    first, last = losses
    return (
        f"{numbers.brief(first)} → {numbers.brief(last)}",
        "good" if last <= first else "doubtful",
    )


def watched(diagnosis: Diagnosis) -> str:
    """What was watched, in a few words."""
    summary = diagnosis.summary
    parts = [wording.count_of(summary.layers, "layer")]
    parts += [f"{len(diagnosis.batch_norm)} with BatchNorm"] if diagnosis.batch_norm else []
    parts += [wording.count_of(summary.outer_steps, "outer step")] if summary.outer_steps else []
    return "watched: " + ", ".join(parts)


def _leading(diagnosis: Diagnosis) -> list[str]:
    """The rule to read up on: of the root cause, else of the gravest finding."""
    findings, cause = diagnosis.findings, diagnosis.root_cause
    if cause is not None and cause.findings:
        return [findings[cause.findings[0]].rule]
    return [finding.rule for finding in wording.ranked(findings)[:1]]


def next_commands(diagnosis: Diagnosis) -> list[str]:
    """Commands worth typing next, the most useful first."""
    commands = [f"probe rule {shlex.quote(one_line(rule))}" for rule in _leading(diagnosis)]
    if diagnosis.recording:
        recording = shlex.quote(one_line(diagnosis.recording))
        commands.append(f"probe report {recording} --report html:report.html")
    return commands
