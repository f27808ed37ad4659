"""Judge a recording again without running anything: the rules over its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from divergence_probe.diagnosis.analysis import Analysis
from divergence_probe.diagnosis.diagnosis import Diagnosis, ExceptionReport
from divergence_probe.record.reader import Recording
from divergence_probe.report.presented import PresentedDiagnosis
from divergence_probe.rules.selection import INTENTS, Selection
from divergence_probe.stored import Ending, read_ending
from divergence_probe.thresholds import Thresholds

UNFINISHED = (
    "The recording has no end: the run was killed, or is still going. Shown is what it had "
    "written by then."
)


def replay(
    recording: Recording,
    selection: Selection | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> PresentedDiagnosis:
    """The diagnosis of a recording, finished or not.

    Args:
        recording: what to judge.
        selection: which findings count; where one of its parts is empty, the run's own holds.
        thresholds: overrides by name, over the run's own.

    Raises:
        UsageError: a threshold has no such name.
    """
    meta = recording.meta
    analysis = Analysis(
        _selection(meta.get("judgement", {}), selection or Selection()),
        Thresholds({**meta.get("judgement", {}).get("thresholds", {}), **(thresholds or {})}),
    )
    for block in recording.blocks():
        analysis.feed(block)
    analysis.finish()
    ending = read_ending(recording.folder, meta)
    diagnosis = analysis.diagnosis(
        overhead=ending.overhead,
        exception=ending.exception or _raised_elsewhere(recording),
        script_exit=ending.script_exit,
        recording=str(recording.folder),
        title=meta.get("title"),
        incomplete=_not_seen(recording),
    )
    return PresentedDiagnosis.of(_with_proof(diagnosis, ending))


def _not_seen(recording: Recording) -> list[str]:
    """What each rank could not see, which had no end, and which recorded nothing."""
    sentences: list[str] = []
    several = len(recording.ranks) > 1
    for rank in recording.ranks:
        meta = recording.rank_meta(rank)
        sentences += meta.get("incomplete", ())
        if not meta.get("complete"):
            sentences.append(f"Rank {rank}: {UNFINISHED}" if several else UNFINISHED)
    world = int(recording.meta.get("world", 1))
    absent = [str(rank) for rank in range(world) if rank not in recording.ranks]
    if absent:
        sentences.append(
            f"Of {world} ranks {', '.join(absent)} recorded nothing here: run every rank under "
            "`probe run`, with the same -o."
        )
    return sentences


def _raised_elsewhere(recording: Recording) -> ExceptionReport | None:
    """What ended the first rank, above 0, that an exception has ended."""
    for rank in recording.ranks[1:]:
        raised = recording.rank_meta(rank).get("exception")
        if isinstance(raised, dict):
            return ExceptionReport(**raised)
    return None


def _selection(recorded: Mapping[str, list[str]], given: Selection) -> Selection:
    intent = tuple(name for name in recorded.get("intent", ()) if name in INTENTS)
    return Selection(
        given.select or tuple(recorded.get("select", ())),
        given.ignore or tuple(recorded.get("ignore", ())),
        given.intent or intent,
    )


def _with_proof(diagnosis: Diagnosis, ending: Ending) -> Diagnosis:
    """The run's own re-runs prove a cause for every later reading of the same steps."""
    cause = diagnosis.root_cause
    if cause is not None and cause.cause == ending.confirmed:
        cause = replace(cause, confidence="confirmed")
    return replace(diagnosis, root_cause=cause, interventions=ending.interventions)
