"""``probe run``: a script or module under watch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from divergence_probe.commands import options
from divergence_probe.commands.base import Command
from divergence_probe.errors import UsageError
from divergence_probe.thresholds import CATALOGUE


class Run(Command):
    """Run a script as python would, watch its inner loops, and report.

    Options come before the script; everything after it belongs to the script. The script's output
    stays its own: the report goes to stderr.

    Exit codes: the script's own where that is not 0; else 0 when nothing at or above --fail-on was
    found, 1 when something was, 2 for a usage error or a failure of the probe, 5 when no inner
    loop was seen.
    """

    name = "run"
    order = 1
    usage = "probe run [OPTIONS] SCRIPT [ARGS...]\n       probe run [OPTIONS] -m MODULE [ARGS...]"

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Options of the run itself, of the findings, and of the reports."""
        parser.add_argument(
            "-m",
            dest="module",
            metavar="MODULE",
            help="run a module by name; everything after it belongs to the module",
        )
        parser.add_argument(
            "-o",
            "--output",
            metavar="DIR",
            type=Path,
            help="folder of the recording (default: a new one under .probe/)",
        )
        parser.add_argument("--force", action="store_true", help="replace a recording in DIR")
        options.add_reports(parser, "stderr")
        options.add_judgement(parser)
        group = parser.add_argument_group("proof")
        group.add_argument(
            "--confirm",
            action="store_true",
            help="run the script again, with one thing changed at a time, to prove the cause; "
            "files it writes are written again, and its standard input is empty then",
        )
        group.add_argument(
            "--confirm-timeout",
            metavar="SECONDS",
            type=_seconds,
            help="limit for one such re-run (default: three times the run, and a minute)",
        )
        group.add_argument(
            "--inner-optimizer",
            metavar="NAME",
            help="the inner optimizer: the script's variable, or the optimizer's class",
        )
        parser.epilog = "thresholds:\n" + "\n".join(
            f"  {one.name:<22} {one.default:<7g} {one.unit}" for one in CATALOGUE
        )

    def parse(self, parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
        """Parse our options only, and keep the rest for the script untouched."""
        own, rest = split_options(parser, arguments)
        parsed = parser.parse_args(own)
        parsed.rest = rest
        if parsed.module is None and not rest:
            parser.error("name the script to run, or -m MODULE")
        return parsed

    def run(self, arguments: argparse.Namespace) -> int:
        """Check everything, then run."""
        from divergence_probe.runner import Target
        from divergence_probe.watched_run import RunOptions, watch

        rest = arguments.rest
        if arguments.module is not None:
            target = Target(None, arguments.module, tuple(rest))
        else:
            target = Target(rest[0], None, tuple(rest[1:]))
        if arguments.confirm_timeout is not None and not arguments.confirm:
            raise UsageError("--confirm-timeout limits the re-runs of --confirm: add --confirm.")
        return watch(
            RunOptions(
                target=target,
                judgement=options.judgement(arguments),
                destinations=options.destinations(arguments),
                output=arguments.output,
                force=arguments.force,
                confirm=arguments.confirm,
                confirm_timeout=arguments.confirm_timeout,
                inner_optimizer=arguments.inner_optimizer,
            )
        )


def split_options(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[list[str], list[str]]:
    """Our own options, and the script with its arguments (or a module's arguments).

    argparse's REMAINDER would take options as well where it comes first, and drops a ``--``.
    """
    takes_value = {
        text: action.nargs != 0 for action in parser._actions for text in action.option_strings
    }
    position = 0
    while position < len(arguments):
        token = arguments[position]
        if token == "--":  # noqa: S105 - no password
            return arguments[:position], arguments[position + 1 :]
        if token == "-" or not token.startswith("-"):  # noqa: S105
            break
        position += 2 if takes_value.get(token) else 1
        if token.startswith("-m") and not token.startswith("--"):
            break
    return arguments[:position], arguments[position:]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds
