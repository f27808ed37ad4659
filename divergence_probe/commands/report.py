"""``probe report``: a recording's report again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from divergence_probe.commands import options
from divergence_probe.commands.base import Command


class Report(Command):
    """Show the report of a recording again, in any format, without running anything.

    Recordings of runs that were killed work too; the report says that they are incomplete. What
    the run was told to select, ignore or mean holds unless given here or in the project's settings.
    """

    name = "report"
    order = 2

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """The recording, the reports, and which findings count."""
        parser.add_argument("recording", metavar="RECORDING", type=Path, help="its folder")
        options.add_reports(parser, "stdout")
        options.add_judgement(parser, fail_on=False)

    def run(self, arguments: argparse.Namespace) -> int:
        """Judge the recorded steps and write the reports."""
        from divergence_probe.record.reader import Recording
        from divergence_probe.replay import replay
        from divergence_probe.report import registry
        from divergence_probe.terminal import wants_color, width_of

        judgement = options.judgement(arguments)
        destinations = options.destinations(arguments)
        recording = Recording(arguments.recording)
        diagnosis = replay(recording, judgement.selection, judgement.thresholds)
        registry.write(
            diagnosis,
            destinations,
            sys.stdout,
            width=width_of(sys.stdout),
            color=wants_color(sys.stdout),
        )
        return 0
