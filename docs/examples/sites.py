"""``probe sites``: an example of a command, for divergence_probe/commands/."""

from __future__ import annotations

import argparse
from pathlib import Path

from divergence_probe.commands.base import Command


class Sites(Command):
    """List the lines at which a recording's inner steps were taken, the busiest first."""

    name = "sites"

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """The recording."""
        parser.add_argument("recording", metavar="RECORDING", type=Path, help="its folder")

    def run(self, arguments: argparse.Namespace) -> int:
        """Count the rows of each line."""
        from divergence_probe.record.reader import Recording  # heavy imports stay in here

        steps = Recording(arguments.recording).steps()
        inner = steps[steps.phase == "support"].drop_duplicates(["task", "step", "site"])
        for site, count in inner.site.value_counts().items():
            print(f"{count:6} {site}")
        return 0
