"""One line a finding, parted by tabs: an example of a format for divergence_probe/report/."""

from __future__ import annotations

from divergence_probe.diagnosis.diagnosis import Diagnosis

FORMAT = "tsv"


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """The findings; only the verdict where there are none."""
    rows = [
        (finding.severity.label, finding.rule, finding.layer or "", finding.message)
        for finding in diagnosis.findings
    ]
    lines = ["\t".join(" ".join(cell.split()) for cell in row) for row in rows]
    return "\n".join([diagnosis.verdict, *lines]) + "\n"
