"""Options several commands share: which findings count, and where reports go."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from divergence_probe.config import Config, read_config
from divergence_probe.errors import UsageError

if TYPE_CHECKING:
    from divergence_probe.rules.finding import Finding
    from divergence_probe.rules.selection import Selection

Destination = tuple[str, Path | None]

FAIL_ON = ("error", "warning", "never")
_FORMATS = "rich, concise, json, html, junit, sarif, github, markdown"


@dataclass(frozen=True)
class Judgement:
    """Which findings count, and which of them fail the command.

    Attributes:
        selection: rules selected and ignored, and the declared intent.
        thresholds: overrides by name.
        fail_on: ``"error"``, ``"warning"`` or ``"never"``.
    """

    selection: Selection
    thresholds: dict[str, float]
    fail_on: str = "error"

    def fails(self, findings: Iterable[Finding]) -> bool:
        """Whether a finding is at or above ``fail_on``."""
        from divergence_probe.rules.finding import Severity

        if self.fail_on == "never":
            return False
        level = Severity.of(self.fail_on)
        return any(finding.severity >= level for finding in findings)


def add_judgement(parser: argparse.ArgumentParser, *, fail_on: bool = True) -> None:
    """Add ``--select``, ``--ignore``, ``--intent``, ``--threshold``, ``--fail-on``."""
    group = parser.add_argument_group("findings")
    group.add_argument(
        "--select",
        metavar="CODES",
        action="append",
        help="keep these rules only: codes or prefixes, comma-separated; CODE:GLOB keeps one for "
        "the layers matching GLOB; repeatable",
    )
    group.add_argument(
        "--ignore",
        metavar="CODES",
        action="append",
        help="drop these rules; CODE:GLOB drops one for the layers matching GLOB",
    )
    group.add_argument(
        "--intent",
        metavar="NAMES",
        action="append",
        help="what is meant, so that it is not remarked on: reptile, continual, first-order, "
        "transductive, frozen, evaluation",
    )
    group.add_argument(
        "--threshold",
        metavar="NAME=VALUE",
        action="append",
        help="override one number a rule compares with; repeatable",
    )
    if fail_on:
        group.add_argument(
            "--fail-on",
            choices=FAIL_ON,
            help="severity of a finding that makes the exit code 1 (default: error)",
        )
    group.add_argument(
        "--isolated",
        action="store_true",
        help="do not read pyproject.toml or setup.cfg of the working directory",
    )


def judgement(arguments: argparse.Namespace) -> Judgement:
    """The options and the project's settings, checked.

    Raises:
        UsageError: an unknown code, intent, threshold, or setting.
    """
    from divergence_probe.rules.registry import select
    from divergence_probe.rules.selection import Selection
    from divergence_probe.thresholds import parse_overrides

    config = Config() if arguments.isolated else read_config(Path.cwd())
    configured = select(config.select, config.ignore, config.intent, f"{config.source}: {{}}")
    given = select(arguments.select or (), arguments.ignore or (), _names(arguments.intent), "--{}")
    try:
        thresholds = parse_overrides(config.thresholds)
    except UsageError as error:
        raise UsageError(f"{config.source}: {error}") from error
    selection = Selection(
        given.select or configured.select,
        given.ignore or configured.ignore,
        given.intent or configured.intent,
    )
    thresholds |= parse_overrides(arguments.threshold or ())
    return Judgement(
        selection, thresholds, getattr(arguments, "fail_on", None) or config.fail_on or "error"
    )


def _names(texts: list[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for text in texts or () for name in text.split(",") if name.strip())


def add_reports(parser: argparse.ArgumentParser, stream: str) -> None:
    """Add ``--report`` and ``--json``; ``stream`` says where formats without a path go."""
    group = parser.add_argument_group("reports")
    group.add_argument(
        "--report",
        metavar="FORMAT[:PATH]",
        action="append",
        help=f"{_FORMATS}; without PATH on {stream}; repeatable (default: rich on {stream})",
    )
    group.add_argument(
        "--json",
        metavar="PATH",
        action="append",
        help=f"short for --report json:PATH; - for {stream}",
    )


def destinations(arguments: argparse.Namespace) -> tuple[Destination, ...]:
    """Where reports go, every file known to be writable and its path absolute.

    Where only files are asked for, the terminal report still goes to the stream.

    Raises:
        UsageError: an unknown format, a path that cannot be written, or one named twice.
    """
    from divergence_probe.report.registry import parse_destination

    if "" in (arguments.json or ()):
        raise UsageError("--json has an empty path; name the file to write.")
    texts = [*(arguments.report or ()), *(f"json:{path}" for path in arguments.json or ())]
    found = [_absolute(parse_destination(text)) for text in dict.fromkeys(texts)]
    paths = [path for _, path in found if path is not None]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"Two reports go to {path}; give each its own file.")
        check_writable(path)
    if len(paths) == len(found):
        found.insert(0, ("rich", None))
    return tuple(found)


def _absolute(destination: Destination) -> Destination:
    # The script may change the working directory before the report is written.
    name, path = destination
    return name, None if path is None or str(path) == "-" else Path.cwd() / path


def check_writable(path: Path) -> None:
    """See that ``path`` can be written, by doing what writing it will do.

    Raises:
        UsageError: it cannot; the message says why.
    """
    import tempfile

    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if path.exists() and not path.is_file():  # a pipe or a device
            return
        if path.exists():
            with path.open("ab"):
                pass
        folder = path.resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"Cannot write to {path}: {reason}. Name a file in a folder you may write to."
        ) from error
