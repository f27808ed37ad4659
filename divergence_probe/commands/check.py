"""``probe check``: a recording's verdict as an exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from divergence_probe.commands import options
from divergence_probe.commands.base import Command
from divergence_probe.errors import RecordingError


class Check(Command):
    """Judge a recording by its exit code, with one line a finding: for CI.

    Exit codes: 0 when nothing at or above --fail-on was found and the script ended well, 1
    otherwise, 2 where there is no recording to read or a part of it is lost, 5 when no inner loop
    was seen. A script that failed counts whatever --fail-on says; one that was killed, or is still
    running, counts unless that is never.
    """

    name = "check"
    order = 3

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """The recording and which findings count."""
        parser.add_argument("recording", metavar="RECORDING", type=Path, help="its folder")
        options.add_judgement(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        """Judge the recorded steps and choose the exit code."""
        from divergence_probe.record.reader import Recording
        from divergence_probe.replay import is_end_known, replay
        from divergence_probe.report import registry

        judgement = options.judgement(arguments)
        recording = Recording(arguments.recording)
        diagnosis = replay(recording, judgement.selection, judgement.thresholds)
        registry.write(diagnosis, [("concise", None)], sys.stdout)
        if recording.damage:
            raise RecordingError(recording.damage)
        if diagnosis.script_exit:
            print(f"the script itself ended with exit code {diagnosis.script_exit}")
            return 1
        if judgement.fail_on != "never" and not is_end_known(recording):
            print("how the script ended is not known: it was killed, or is still running")
            return 1
        if judgement.fails(diagnosis.findings):
            return 1
        return 0 if diagnosis.summary.inner_steps else 5
