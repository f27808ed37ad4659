"""The command line: finds the command, hands it the rest, turns our errors into exit codes.

Nothing heavy is imported here: ``probe --help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence

from divergence_probe.commands.base import Command
from divergence_probe.commands.registry import all_commands
from divergence_probe.errors import ProbeError
from divergence_probe.version import __version__

INTERRUPTED = 130  # what a shell shows for a process that died by SIGINT
USAGE = 2
_EPILOG = "`probe COMMAND --help` explains a command."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by ``argv`` (the process's own arguments by default).

    Returns:
        The exit code of the contract: 0, 1, 2, 5, 130 or the watched script's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except ProbeError as error:
        print(f"probe: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as error:  # argparse, after it has said what is wrong
        return error.code if isinstance(error.code, int) else 0 if error.code is None else USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `probe rule --all | head`: python must not complain either when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    commands = all_commands()
    name = arguments[0] if arguments else "--help"
    if name in ("-V", "--version"):
        print(f"divergence-probe {__version__}")
        return 0
    if name in ("-h", "--help", "help") and name not in commands:
        parser = _overview(commands)
        parser.print_help(sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE
    if name not in commands:
        return _unknown(name, commands)
    return commands[name]().main(arguments[1:])


def _unknown(name: str, commands: Mapping[str, type[Command]]) -> int:
    if name.startswith("-"):
        print(f"probe: there is no option {name}. Options follow the command.", file=sys.stderr)
    else:
        close = difflib.get_close_matches(name, commands, n=1)
        meant = f" Did you mean `probe {close[0]}`?" if close else ""
        if name.endswith(".py"):
            meant = f" To watch a script: `probe run {name}`."
        print(f"probe: there is no command {name!r}.{meant}", file=sys.stderr)
    print(f"Commands: {', '.join(commands)}.", file=sys.stderr)
    return USAGE


def _overview(commands: Mapping[str, type[Command]]) -> argparse.ArgumentParser:
    width = max(len(name) for name in commands)
    lines = [f"  {name:<{width}}  {command.summary()}" for name, command in commands.items()]
    parser = argparse.ArgumentParser(
        prog="probe",
        usage="probe COMMAND [OPTIONS] ...",
        description="Watch nested training loops and say why an inner loop diverges.\n\n"
        "commands:\n" + "\n".join(lines),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="store_true", help="show the version and exit")
    return parser
