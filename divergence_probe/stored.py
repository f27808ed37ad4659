"""How a run ended, kept in the recording's folder: ``findings.json`` and ``diagnosis.json``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from divergence_probe.diagnosis.diagnosis import Diagnosis, ExceptionReport, Intervention
from divergence_probe.errors import RecordingError
from divergence_probe.record.damage import told_as_damage

FINDINGS = "findings.json"
DIAGNOSIS = "diagnosis.json"


@dataclass(frozen=True)
class Ending:
    """What only the run itself knew, and no recorded step tells.

    Attributes:
        script_exit: the script's own exit code.
        exception: what ended it, or None.
        overhead: the probe's share of the run's time, 0 to 1.
        interventions: re-runs that tried to prove the cause.
        confirmed: the cause they proved, or None.
    """

    script_exit: int = 0
    exception: ExceptionReport | None = None
    overhead: float = 0.0
    interventions: tuple[Intervention, ...] = ()
    confirmed: str | None = None


def write_ending(folder: Path, diagnosis: Diagnosis) -> None:
    """Write both files, each whole or not at all.

    ``diagnosis.json`` is the JSON report and, under ``"ending"``, what that leaves out.

    Raises:
        RecordingError: the folder cannot be written.
    """
    from divergence_probe.report.json_report import to_dict

    report = to_dict(diagnosis)
    raised = diagnosis.exception
    report["ending"] = {
        "exception_site": raised.site if raised is not None else None,
        "interventions": [
            {**asdict(one), "largest_norm": str(one.largest_norm)}
            for one in diagnosis.interventions
        ],
    }
    for name, content in ((FINDINGS, report["findings"]), (DIAGNOSIS, report)):
        temporary = folder / f"{name}.tmp"
        try:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
            os.replace(temporary, folder / name)
        except OSError as error:
            raise RecordingError(
                f"Cannot write {folder / name}: {error.strerror or error}. The recorded steps are "
                "kept; `probe report` works on them."
            ) from error


def read_ending(folder: Path, meta: dict[str, Any]) -> Ending:
    """How the run ended; where ``diagnosis.json`` was never written, what ``meta.json`` knows.

    Raises:
        RecordingError: ``diagnosis.json`` is damaged.
    """
    overhead = float(meta.get("overhead_fraction", 0.0))
    path = folder / DIAGNOSIS
    if path.exists():
        with told_as_damage(path):
            return _ending(json.loads(path.read_text(encoding="utf-8")), overhead)
    raised = meta.get("exception")
    exception = ExceptionReport(**raised) if isinstance(raised, dict) else None
    return Ending(int(exception is not None), exception, overhead)


def _ending(stored: dict[str, Any], overhead: float) -> Ending:
    raised, rest, cause = stored["exception"], stored["ending"], stored["root_cause"]
    return Ending(
        script_exit=int(stored["script_exit"]),
        exception=None
        if raised is None
        else ExceptionReport(**raised, site=rest["exception_site"]),
        overhead=overhead,
        interventions=tuple(
            Intervention(**{**one, "largest_norm": float(one["largest_norm"])})
            for one in rest["interventions"]
        ),
        confirmed=cause["cause"] if cause and cause["confidence"] == "confirmed" else None,
    )
