"""Run a user's script or module in this process as plain ``python`` would.

One run a process: the script's module stays ``sys.modules["__main__"]`` afterwards, since its exit
handlers and worker processes need it there.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.util
import io
import marshal
import os
import pkgutil
import runpy
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import ModuleType, TracebackType
from typing import NoReturn

INTERRUPTED = 130  # what a shell shows for a process that died by SIGINT
PYC_HEADER = 16  # bytes before the code in a .pyc file
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_DEMO = os.path.join(_PACKAGE, "demo") + os.sep  # scripts like a user's
FLUSH_FAILED = 120  # what python exits with when its last output could not be written


@dataclass(frozen=True)
class Target:
    """What to run: a script's path or a module's name, with its arguments."""

    script: str | None
    module: str | None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit_code: what plain python would have exited with.
        exception: the one that ended it; None for a normal end and for `sys.exit`.
    """

    exit_code: int
    exception: BaseException | None


class TargetError(Exception):
    """Nothing to run: no such file, a directory without ``__main__.py``, an unknown module."""


def check(target: Target) -> None:
    """Look whether there is something to run, without running or importing any of it.

    Raises:
        TargetError: there is not; the message says what, where and what to do.
    """
    if target.script is not None and target.module is None:
        _check_script(target.script)
    elif target.module is not None and target.script is None:
        _check_module(target.module)
    else:
        raise TargetError("Name what to run: either a script or, after -m, a module.")


def run(
    target: Target,
    *,
    around: Callable[[], AbstractContextManager[None]] | None = None,
    show_exception: Callable[[BaseException], None] | None = None,
) -> Outcome:
    """Run `target` as ``__main__`` and say how it ended.

    Args:
        target: what to run.
        around: entered right before the user's code, exited once that has ended, its non-daemon
            threads included; it sees the exception that ended it but cannot swallow it.
        show_exception: shows an uncaught exception, in place of the script's `sys.excepthook`.

    A child that the script forks never returns from here: it exits as under plain python.

    Raises:
        TargetError: there is nothing to run.
        Exception: whatever `around` or `show_exception` raise themselves.
    """
    check(target)
    execute = _prepare(target)
    parent = os.getpid()
    exception: BaseException | None = None
    try:
        with around() if around else contextlib.nullcontext():
            exception = _ended_by(execute)
            # Not in an except clause: the script's own hooks would find themselves in its middle.
            exit_code = _conclude(exception, show_exception) if exception is not None else 0
            _wait_for_threads()
            if os.getpid() != parent:
                _leave_child(exit_code)
            if exception is not None:
                raise exception
    except BaseException as error:
        if error is not exception:  # not the user's own: it goes on to our caller
            raise
    if exception is not None:
        _without_own_frames(exception)  # passing through here has put one on again
    return Outcome(exit_code, None if isinstance(exception, SystemExit) else exception)


def _check_script(script: str) -> None:
    where = f"{script!r} (working directory {_working_directory()!r})"
    if not os.path.exists(script):
        raise TargetError(f"No such script: {where}. Check the path; -m runs a module by name.")
    if not os.access(script, os.R_OK):
        raise TargetError(f"Script cannot be read: {where}. Check its permissions.")
    importer = pkgutil.get_importer(_absolute(script))
    if importer is not None and importer.find_spec("__main__") is None:
        raise TargetError(f"No __main__.py in {where}. Name the script in it that is to be run.")


def _check_module(module: str) -> None:
    """Look for the first name only: to look further, python must run the package's own code."""
    path = sys.path[:]
    try:
        _replace_path_entry(_working_directory())
        found = importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, AttributeError, TypeError, ValueError):  # as runpy; ".name" ends here too
        found = False
    finally:
        sys.path[:] = path
    if not found:
        raise _unknown_module(module, f"No module named {module!r}")


def _unknown_module(module: str, reason: str) -> TargetError:
    remedy = "Check the name, the working directory and that it is installed"
    if module.endswith(".py"):
        remedy = "Leave out -m to run a file"
    where = f"{sys.executable} in {_working_directory()!r}"
    return TargetError(f"{reason} (searched by {where}). {remedy}.")


def _prepare(target: Target) -> Callable[[], None]:
    """Set up `sys` and ``__main__`` as they are before the first line of the user's code."""
    main = ModuleType("__main__")
    main.__loader__ = BuiltinImporter
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    vars(main)["__builtins__"] = builtins  # the module; exec would put its dictionary here
    if target.script is None:
        assert target.module is not None
        _replace_path_entry(_working_directory())
        sys.argv = ["-m", *target.arguments]  # until runpy puts the file's path there
        execute = partial(_run_module, target.module, True)
    else:
        path = _absolute(target.script)
        if pkgutil.get_importer(path) is not None:  # a directory or a zip file
            _replace_path_entry(path, even_if_safe=True)
            execute = partial(_run_module, "__main__", False)
        else:
            execute = partial(_run_script, _read(path), path, main)
            _replace_path_entry(os.path.dirname(os.path.realpath(path)))
        sys.argv = [target.script, *target.arguments]
    sys.modules["__main__"] = main
    return execute


def _replace_path_entry(entry: str | None, *, even_if_safe: bool = False) -> None:
    """Put `entry` where python has put the directory of our own command (nowhere with -P)."""
    safe = getattr(sys.flags, "safe_path", bool(sys.flags.isolated))
    if not safe:
        del sys.path[:1]
    if entry is not None and (even_if_safe or not safe):
        sys.path.insert(0, entry)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # deleted meanwhile; python too goes on without it
        return None


def _absolute(path: str) -> str:
    """Make `path` absolute as python does for ``__file__``: joined, not normalised."""
    directory = _working_directory()
    if directory is None:
        return path
    return directory if path == "." else os.path.join(directory, path)


def _read(path: str) -> bytes:
    try:
        with io.open_code(path) as file:
            return file.read()
    except OSError as error:
        raise TargetError(f"Cannot read script: {error}. Check path and permissions.") from error


def _run_script(content: bytes, path: str, main: ModuleType) -> None:
    compiled = content.startswith(importlib.util.MAGIC_NUMBER)
    main.__loader__ = (SourcelessFileLoader if compiled else SourceFileLoader)("__main__", path)
    main.__file__ = path
    vars(main)["__cached__"] = None
    try:
        # Without dont_inherit this module's own __future__ imports would hold in the script.
        source = compile(content, path, "exec", dont_inherit=True) if not compiled else None
        exec(source or marshal.loads(content[PYC_HEADER:]), vars(main))  # noqa: S102 - our purpose
    finally:
        _flush()  # so that a traceback comes after the output, as python has it


def _run_module(module: str, alter_argv: bool) -> None:
    """Run by the very function that ``python -m`` calls; ``__main__`` is for sys.path[0]."""
    try:
        runpy._run_module_as_main(module, alter_argv)  # type: ignore[attr-defined]
    except SystemExit as error:
        if isinstance(error.__context__, runpy._Error):  # type: ignore[attr-defined]
            raise _unknown_module(module, str(error.__context__)) from None
        raise


def _ended_by(execute: Callable[[], None]) -> BaseException | None:
    try:
        execute()
    except TargetError:
        raise
    except BaseException as error:  # noqa: BLE001 - every end of the script is an outcome
        return _without_own_frames(error)
    return None


def _without_own_frames(error: BaseException) -> BaseException:
    """Drop the probe's frames from the traceback, and from those of what led to it.

    They stand at its top, and in between where the probe watches a call of the script's.
    """
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = _foreign_frames(link.__traceback__)
            chain += [link.__cause__, link.__context__]
    return error


def _foreign_frames(traceback: TracebackType | None) -> TracebackType | None:
    kept: TracebackType | None = None
    frames = []
    while traceback is not None:
        if not _is_own(traceback.tb_frame.f_code.co_filename):
            frames.append(traceback)
        traceback = traceback.tb_next
    for frame in reversed(frames):
        frame.tb_next = kept
        kept = frame
    return kept


def _is_own(filename: str) -> bool:
    if filename.startswith("<divergence_probe"):  # handlers, see observe/patching.py
        return True
    return filename.startswith(_PACKAGE) and not filename.startswith(_DEMO)


def _conclude(error: BaseException, show: Callable[[BaseException], None] | None) -> int:
    """Say on stderr what python says about the exception, and return its exit code."""
    if isinstance(error, SystemExit):
        return _exit_code(error)
    if show is not None:
        show(error)
    else:
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        if sys.version_info >= (3, 12):
            sys.last_exc = error
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as asked:
            return _exit_code(asked)
        except BaseException as failure:  # noqa: BLE001 - shown, as python does
            print("Error in sys.excepthook:", file=sys.stderr)
            traceback.print_exception(_without_own_frames(failure))
            print("\nOriginal exception was:", file=sys.stderr)
            traceback.print_exception(error)
    return INTERRUPTED if type(error) is KeyboardInterrupt else 1


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF if os.name == "posix" else error.code
    with contextlib.suppress(Exception):
        print(error.code, file=sys.stderr or sys.__stderr__)
    return 1


def _wait_for_threads() -> None:
    """Wait as python does before its exit handlers, where it then finds nothing left to do."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException as error:  # noqa: BLE001 - Ctrl-C; python too shows it and goes on
        print("Exception ignored in: waiting for threads", file=sys.stderr)
        traceback.print_exception(_without_own_frames(error))
    finally:
        # Else nothing could import concurrent.futures any more, and a report is still to come.
        vars(threading)["_SHUTTING_DOWN"] = False


def _leave_child(exit_code: int) -> NoReturn:
    """End a forked child as python would, without returning into the parent's probe."""
    atexit._run_exitfuncs()
    os._exit(exit_code if _flush() else FLUSH_FAILED)


def _flush() -> bool:
    flushed = True
    for stream in (sys.stderr, sys.stdout):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except Exception:  # noqa: BLE001 - any stream may stand here
                flushed = False
    return flushed
