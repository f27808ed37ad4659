"""Judge a recording again without running anything: the rules over its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from divergence_probe.diagnosis.analysis import Analysis
from divergence_probe.diagnosis.diagnosis import Diagnosis, ExceptionReport
from divergence_probe.record.damage import told_as_damage
from divergence_probe.record.reader import Recording
from divergence_probe.report.presented import PresentedDiagnosis
from divergence_probe.rules.selection import INTENTS, Selection
from divergence_probe.stored import DIAGNOSIS, Ending, read_ending
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
        RecordingError: it is damaged beyond reading.
        UsageError: a threshold has no such name.
    """
    meta = recording.meta
    with told_as_damage(recording.meta_file):
        judged = meta.get("judgement", {})
        chosen = _selection(judged, selection or Selection())
        limits = {**judged.get("thresholds", {}), **(thresholds or {})}
        ending = read_ending(recording.folder, meta)
        seconds = float(meta.get("seconds", 0.0))
    analysis = Analysis(chosen, Thresholds(limits))
    for block in recording.blocks():
        analysis.feed(block)
    analysis.finish()
    diagnosis = analysis.diagnosis(
        overhead=ending.overhead,
        seconds=seconds,
        exception=ending.exception or _raised_elsewhere(recording),
        script_exit=ending.script_exit,
        recording=str(recording.folder),
        title=meta.get("title"),
        incomplete=_not_seen(recording),
    )
    return PresentedDiagnosis.of(_with_proof(diagnosis, ending))


def is_end_known(recording: Recording) -> bool:
    """Whether the recording says how the script ended; not where that was killed or is still going.

    `probe run` writes an exit code last; a recording of ``attach()`` ends with its block.
    """
    watched_run = "judgement" in recording.meta
    return recording.complete and (not watched_run or (recording.folder / DIAGNOSIS).exists())


def _not_seen(recording: Recording) -> list[str]:
    """What each rank could not see, which had no end, which recorded nothing, what is damaged."""
    sentences: list[str] = [recording.damage] if recording.damage else []
    several = len(recording.ranks) > 1
    for rank in recording.ranks:
        meta = recording.rank_meta(rank)
        sentences += meta.get("incomplete", ())
        if not meta.get("complete"):
            sentences.append(f"Rank {rank}: {UNFINISHED}" if several else UNFINISHED)
    world = int(recording.meta.get("world", 1))
    absent = [str(rank) for rank in range(world) if rank not in recording.ranks]
    if absent and world > 1:
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
