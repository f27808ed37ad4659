"""Prove the zoo's faults: ``probe run --confirm`` on every faulty script whose cause has a proof.

``python -m tests.zoo.confirm`` prints a line a script and the table; ``--only TEXT`` runs scripts
whose path contains TEXT; ``--write docs/confirmations.md`` writes the table. One script after the
other: each is run once, again as a control, and once for every intervention.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divergence_probe.diagnosis.confirm import CONTROL, PROOFS
from tests.zoo.score import HERE, become_probe, expectations, preload, wait_for

SECONDS = 600


@dataclass
class Proof:
    """What the re-runs of one script proved."""

    script: str
    expected: str
    report: dict[str, Any] | None
    said: str
    seconds: float

    @property
    def root(self) -> dict[str, Any]:
        """The root cause; empty without one."""
        return (self.report or {}).get("root_cause") or {}

    @property
    def confirmed(self) -> bool:
        """Whether a cause was confirmed, the expected one or not."""
        return bool(self.root.get("confidence") == "confirmed")

    @property
    def right(self) -> bool:
        """Whether the expected cause was confirmed."""
        return self.confirmed and self.root["cause"] == self.expected

    @property
    def wrong(self) -> bool:
        """Whether another cause was confirmed: never to happen."""
        return self.confirmed and not self.right

    @property
    def outcomes(self) -> dict[str, str]:
        """How each re-run ended."""
        runs = (self.report or {}).get("interventions", [])
        return {run["name"]: run["outcome"] for run in runs}

    @property
    def why_not(self) -> str:
        """Why the expected cause was not confirmed; empty where it was."""
        if self.right:
            return ""
        if self.report is None:
            return "the run failed"
        if self.root.get("cause") != self.expected:
            return f"diagnosed as {self.root.get('cause') or 'nothing'}"
        found = re.search(r"is not confirmed: (.*?)\.$", self.said, re.M)
        found = found or re.search(r"--confirm[: ]+(.*)$", self.said, re.M)
        return found[1] if found else "nothing was said"


def prove(script: str, cause: str) -> Proof:
    """Run one script with ``--confirm``."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        child = os.fork()
        if child == 0:
            become_probe(HERE / script, Path(folder), report, "--confirm", seconds=SECONDS)
        wait_for(child)
        data = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        said = (Path(folder) / "log").read_text(encoding="utf-8", errors="replace")
    return Proof(script, cause, data, said, time.perf_counter() - started)


def line(proof: Proof) -> str:
    """One script in a line."""
    mark = "ok   " if proof.right else "WRONG" if proof.wrong else "no   "
    runs = ", ".join(f"{name} {outcome}" for name, outcome in proof.outcomes.items())
    why = f": {proof.why_not}" if proof.why_not else ""
    return f"{mark} {proof.script}{why} [{runs}] ({proof.seconds:.0f} s)"


def table(proofs: list[Proof]) -> str:
    """The proofs by cause, and what was not proved, as Markdown."""
    groups: dict[str, list[Proof]] = defaultdict(list)
    for proof in proofs:
        groups[proof.expected].append(proof)
    lines = [
        "| cause | by | scripts | confirmed | not confirmed | wrong cause confirmed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(f"`{cause}`", members) for cause, members in sorted(groups.items())]
    lines.append(_row("**all**", proofs))
    missing = [proof for proof in proofs if not proof.right]
    if missing:
        lines += ["", "Not confirmed, and why:", ""]
        lines += [
            f"- `{proof.script.removeprefix('faulty/')}`: {proof.why_not}" for proof in missing
        ]
    return "\n".join(lines)


def _row(title: str, proofs: list[Proof]) -> str:
    stable = {
        name
        for proof in proofs
        if proof.right
        for name, outcome in proof.outcomes.items()
        if outcome == "stable" and name != CONTROL and name in PROOFS[proof.expected]
    }
    by = ", ".join(f"`{name}`" for name in sorted(stable)) if title.startswith("`") else ""
    return (
        f"| {title} | {by} | {len(proofs)} | {sum(proof.right for proof in proofs)} "
        f"| {sum(not proof.confirmed for proof in proofs)} "
        f"| {sum(proof.wrong for proof in proofs)} |"
    )


_PAGE = """# Confirmations

Made by `python -m tests.zoo.confirm --write docs/confirmations.md`: every faulty script of the zoo
whose cause has an intervention, run with `--confirm` ([confirm.md](confirm.md)).

"""


def main() -> int:
    """Prove what can be proved; exit 1 where a wrong cause was confirmed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="scripts whose path contains this")
    parser.add_argument("--write", type=Path, help="write the table into this Markdown file")
    arguments = parser.parse_args()
    preload()
    proofs = []
    for script, expected in expectations().items():
        if (
            script.startswith("faulty/")
            and expected["cause"] in PROOFS
            and arguments.only in script
        ):
            proofs.append(prove(script, expected["cause"]))
            print(line(proofs[-1]), flush=True)
    print(table(proofs))
    if arguments.write:
        arguments.write.write_text(_PAGE + table(proofs) + "\n", encoding="utf-8")
    return int(any(proof.wrong for proof in proofs))


if __name__ == "__main__":
    sys.exit(main())
