"""The command line: finds the command, hands it the rest, turns our errors into exit codes.

Nothing heavy is imported here: ``probe --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Mapping, Sequence

from divergence_probe.commands.base import Command
from divergence_probe.commands.registry import all_commands
from divergence_probe.errors import ProbeError, fault_of_ours
from divergence_probe.version import __version__

INTERRUPTED = 130  # what a shell shows for a process that died by SIGINT
PIPE_CLOSED = 141  # and by SIGPIPE, since its reader had enough
USAGE = FAILED = 2
_EPILOG = "`probe COMMAND --help` explains a command."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by ``argv`` (the process's own arguments by default).

    Returns:
        The exit code of the contract: 0, 1, 2, 5, 130, 141 or the watched script's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _ended(arguments)
        if arguments[:1] != ["run"]:  # what a script printed python flushes at exit, and complains
            _flush_stdout()
        return code
    except ProbeError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `probe rule --all | head`
        _let_go_of_stdout()
        return PIPE_CLOSED
    except Exception as error:  # noqa: BLE001 - a traceback's exit code is that of a finding
        _say(_why(error))
        return FAILED


def _ended(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except SystemExit as error:  # argparse, after it has said what is wrong
        return error.code if isinstance(error.code, int) else 0 if error.code is None else USAGE


def _why(error: Exception) -> str:
    """What happened, of an exception that no command made sense of."""
    if sys.stdout is None:
        return "Standard output is closed. Redirect it, if only to /dev/null."
    if isinstance(error, FileNotFoundError) and not _has_directory():
        return "The working directory has been removed. Change to one that is there."
    if isinstance(error, OSError) and error.errno and error.filename is None:
        _let_go_of_stdout()
        return f"Cannot write to standard output: {error.strerror}. Redirect it elsewhere."
    return fault_of_ours(error)


def _has_directory() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _flush_stdout() -> None:
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    sys.stdout.flush()


def _let_go_of_stdout() -> None:
    """Else python complains at exit, when it flushes what is left."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    if sys.stderr is not None:  # print would take stdout for it
        with contextlib.suppress(OSError, ValueError):
            print(f"probe: {text}", file=sys.stderr)


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
        _say(f"there is no option {name}. Options follow the command.")
    else:
        close = difflib.get_close_matches(name, commands, n=1)
        meant = f" Did you mean `probe {close[0]}`?" if close else ""
        if name.endswith(".py"):
            meant = f" To watch a script: `probe run {name}`."
        _say(f"there is no command {name!r}.{meant}")
    _say(f"the commands are {', '.join(commands)}.")
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
