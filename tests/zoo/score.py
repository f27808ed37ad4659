"""Run every script of the zoo under the probe and score the diagnoses.

``python -m tests.zoo.score`` prints the table; ``--write docs/accuracy.md`` writes it;
``--only TEXT ...`` runs scripts whose path contains one of the texts; ``--afar`` has the probe take
the CPU for an accelerator, whose values it may not look at in a step. Each script runs as
``probe run --json ... SCRIPT`` in a process of its own, forked from one that has torch imported; in
as many as ``ranks`` in the expectations says, as under torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 120
_SEVERITIES = {"info": 1, "warning": 2, "error": 3}


@dataclass
class Score:
    """One script's diagnosis against what is expected of it."""

    script: str
    expected: dict[str, Any]
    report: dict[str, Any] | None
    exit_code: int
    seconds: float
    problems: list[str] = field(default_factory=list)

    @property
    def faulty(self) -> bool:
        """Whether something is wrong with the script."""
        return self.script.startswith("faulty/")

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What the probe found."""
        return self.report["findings"] if self.report else []

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Findings at warning or above."""
        return [f for f in self.findings if _SEVERITIES[f["severity"]] > 1]

    @property
    def detected(self) -> bool:
        """Whether the fault was seen at the severity it deserves."""
        if self.report is None:
            return False
        if self.expected.get("severity") == "info":
            return any(f["cause"] == self.expected["cause"] for f in self.findings)
        return self.report["verdict"] in self.expected["verdict"] and (
            bool(self.alarms) or self.report["exception"] is not None
        )

    @property
    def cause_right(self) -> bool:
        """Whether the root cause is the expected one (for info: whether it is among findings)."""
        if self.report is None:
            return False
        if self.expected.get("severity") == "info":
            return self.detected and not self.alarms
        root = self.report["root_cause"]
        return root is not None and root["cause"] == self.expected["cause"]

    @property
    def layer_right(self) -> bool | None:
        """Whether the first bad layer is right; None where none is expected."""
        layer = self.expected.get("layer")
        if layer is None or self.report is None or self.report["root_cause"] is None:
            return None
        first = self.findings[self.report["root_cause"]["findings"][0]]["layer"] or ""
        return bool(first) and (
            first == layer or first.startswith(layer + ".") or layer.startswith(first + ".")
        )

    @property
    def warned_before(self) -> int | None:
        """Steps between the first forecast and the first non-finite loss, where there is one."""
        bad = self.expected.get("first_nonfinite_step")
        if bad is None or self.expected["cause"] != "inner-lr-too-high":
            return None
        steps = [
            f["step"] for f in self.alarms if f["rule"] in ("LR001", "LR002", "NG001", "LG001")
        ]
        steps = [step for step in steps if step is not None]
        return bad - min(steps) if steps else -1

    @property
    def false_alarm(self) -> bool:
        """Whether a healthy script got a finding at warning or above (or was not seen)."""
        if self.report is None:
            return True
        return bool(self.alarms) or self.report["verdict"] not in self.expected["verdict"]

    @property
    def unexpected(self) -> bool:
        """Whether the outcome is wrong, and not one that ``missed`` in the expectations admits."""
        if "missed" in self.expected:
            return False
        return not self.cause_right if self.faulty else self.false_alarm


def expectations() -> dict[str, dict[str, Any]]:
    """What is expected of every script, by its path in the zoo."""
    return tomllib.loads((HERE / "expected.toml").read_text(encoding="utf-8"))


def preload() -> None:
    """Import once what would be imported in every child."""
    import higher  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torchopt  # noqa: F401

    import divergence_probe.observe.observer
    import divergence_probe.probe
    import divergence_probe.replay  # noqa: F401
    from divergence_probe.commands.registry import all_commands
    from divergence_probe.rules.registry import all_rules
    from divergence_probe.watched_run import warm_up

    all_commands()
    all_rules()
    warm_up((("rich", None), ("json", None)))


def put_afar() -> None:
    """Have the probe take no value to be at hand, by whatever name it asks."""
    from divergence_probe.observe import at_hand

    at_hand.waits_for_nothing.__code__ = (lambda tensor: False).__code__


def run(scripts: Iterable[tuple[str, dict[str, Any]]], echo: bool = False) -> list[Score]:
    """Run scripts one after the other."""
    preload()
    scores = []
    for script, expected in scripts:
        score = _run(script, expected)
        scores.append(score)
        if echo:
            print(_line(score), flush=True)
    return scores


def _run(script: str, expected: dict[str, Any]) -> Score:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        children = []
        for place in _places(expected.get("ranks", 1)):
            children.append(os.fork())
            if children[-1] == 0:
                os.environ.update(place)
                become_probe(HERE / script, Path(folder), report)
        code, *_ = [wait_for(child) for child in children]  # rank 0's
        data = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
    return Score(script, expected, data, code, time.perf_counter() - started)


def _places(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun sets it."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def become_probe(
    script: Path, folder: Path, report: Path, *options: str, seconds: int = SECONDS
) -> None:
    """Be ``probe run`` in ``folder``, its output in the file ``log`` there; never returns."""
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.alarm(seconds)
        from divergence_probe.cli import main

        code = main(["run", "-o", "recording", "--json", str(report), *options, str(script)])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


def wait_for(child: int) -> int:
    """Its exit code."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _line(score: Score) -> str:
    if score.report is None:
        return f"CRASH {score.script} exit {score.exit_code}"
    root = score.report["root_cause"]
    mark = "ok  "
    if score.faulty:
        if not score.detected:
            mark = "MISS"
        elif not score.cause_right:
            mark = "WHY "
        elif score.layer_right is False:
            mark = "LAYR"
    elif score.false_alarm:
        mark = "ALRM"
    found = " ".join(
        f"{f['severity'][0]}:{f['rule']}({f['cause'] or ''})x{f['count']}@{f['layer']}"
        for f in score.findings
    )
    warned = "" if score.warned_before is None else f" warned {score.warned_before} before"
    return (
        f"{mark} {score.script} [{score.report['verdict']}] root={root and root['cause']}"
        f" tasks={score.report['summary']['tasks']}/{score.report['summary']['inner_steps']}"
        f" {found}{warned} ({score.seconds:.1f} s)"
    )


def table(scores: list[Score]) -> str:
    """The scores by cause, as Markdown."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        groups[Path(score.script).parent.name].append(score)
    lines = [
        "| cause | faulty | detected | root cause | first layer | healthy | false alarms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(name, members) for name, members in sorted(groups.items())]
    lines.append(_row("**all**", scores))
    warned = [s.warned_before for s in scores if s.warned_before is not None]
    long = [
        w
        for s, w in ((s, s.warned_before) for s in scores)
        if w is not None and s.expected["first_nonfinite_step"] >= 4
    ]
    if warned:
        early = sum(w >= 2 for w in long)
        lines += [
            "",
            f"Forecasts: {early} of {len(long)} explosions that last four steps or more were "
            f"announced at least two steps before the first non-finite loss (steps of warning: "
            f"{', '.join(str(w) for w in sorted(warned))}).",
        ]
    return "\n".join(lines)


def _row(name: str, scores: list[Score]) -> str:
    faulty = [s for s in scores if s.faulty]
    healthy = [s for s in scores if not s.faulty]
    layers = [s.layer_right for s in faulty if s.layer_right is not None]
    return (
        f"| {name} | {len(faulty)} | {sum(s.detected for s in faulty)} "
        f"| {sum(s.cause_right for s in faulty)} | {sum(layers)} of {len(layers)} "
        f"| {len(healthy)} | {sum(s.false_alarm for s in healthy)} |"
    )


def main() -> int:
    """Score the zoo; exit 1 where a fault was missed or a healthy script alarmed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="scripts whose path contains one")
    parser.add_argument("--afar", action="store_true", help="as on an accelerator")
    parser.add_argument("--write", type=Path, help="write the table into this Markdown file")
    arguments = parser.parse_args()
    if arguments.afar:
        put_afar()
    chosen = [(s, e) for s, e in expectations().items() if any(t in s for t in arguments.only)]
    scores = run(chosen, echo=True)
    print(table(scores))
    if arguments.write:
        arguments.write.write_text(
            "# Accuracy\n\nMade by `python -m tests.zoo.score --write docs/accuracy.md`.\n\n"
            + table(scores)
            + "\n",
            encoding="utf-8",
        )
    return 1 if any(score.unexpected for score in scores) else 0


if __name__ == "__main__":
    sys.exit(main())
