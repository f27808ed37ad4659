"""Finds the report formats, reads destinations such as ``json:PATH``, and writes reports.

A format is a module of this package with ``FORMAT: str`` and
``render(diagnosis, *, width=None, color=False) -> str``. Third parties name such a module, or any
object with these two attributes, in the entry-point group ``divergence_probe.reports``.
"""

from __future__ import annotations

import difflib
import errno
import functools
import importlib
import os
import pkgutil
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Protocol, TextIO, cast

from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.errors import ProbeError, UsageError
from divergence_probe.report.plain_text import for_encoding

ENTRY_POINTS = "divergence_probe.reports"
_FILE_WIDTH = 100

Destination = tuple[str, "Path | None"]


class Format(Protocol):
    """What a format offers."""

    FORMAT: str

    def render(self, diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
        """The diagnosis as text."""


@functools.cache
def _own() -> dict[str, Format]:
    import divergence_probe.report as package

    found = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        if not module_info.ispkg:
            module = importlib.import_module(f"{package.__name__}.{module_info.name}")
            if hasattr(module, "FORMAT"):
                found[module.FORMAT] = cast(Format, module)
    return found


def formats() -> dict[str, Format]:
    """Every format by name, ``rich`` first; a third party's never replaces one of ours."""
    found = dict(_own())
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name not in found:
            try:
                found[entry.name] = cast(Format, entry.load())
            except Exception as error:  # a broken plugin must not take the other reports with it
                _warn(f"divergence-probe: report format {entry.name!r} left out: {error!r}")
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "rich", name))}


def render(
    name: str, diagnosis: Diagnosis, *, width: int | None = None, color: bool = False
) -> str:
    """The diagnosis in the format ``name``.

    Raises:
        UsageError: for a format that does not exist.
    """
    return _format(name).render(diagnosis, width=width, color=color)


def parse_destination(text: str) -> Destination:
    """``"json:PATH"`` as ``("json", PATH)``; ``"json"`` alone goes to the stream, with path None.

    Raises:
        UsageError: for a format that does not exist, or an empty path.
    """
    name, colon, path = text.partition(":")
    _format(name)
    if colon and not path:
        raise UsageError(
            f"--report '{text}' has no path after the colon; write {name}:PATH, or {name} alone."
        )
    return name, Path(path).expanduser() if path else None


def _format(name: str) -> Format:
    known = formats()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"There is no report format {name!r}.{meant} Formats: {', '.join(known)}.")


def write(
    diagnosis: Diagnosis,
    destinations: Iterable[Destination],
    stream: TextIO | None,
    *,
    width: int | None = None,
    color: bool = False,
    ascii_only: bool | None = None,
) -> None:
    """Write the diagnosis to each destination; those without a path go to ``stream``.

    Files come first: the stream may have gone away, and they must be there all the same.

    Args:
        diagnosis: what to show.
        destinations: as :func:`parse_destination` gives them.
        stream: where formats without a path go, None for one that was closed before python began;
            characters its encoding lacks are replaced.
        width: cells of a line in the terminal report; by default 80 on a stream, 100 in a file.
        color: whether the stream takes escape codes; files never get them.
        ascii_only: True draws with ASCII on the stream, None only where its encoding asks for it.

    Raises:
        UsageError: for a format that does not exist.
        ProbeError: when a report failed or its file cannot be written; the others are written
            all the same.
        OSError: the stream cannot be written, and nothing else has failed.
    """
    failed: list[str] = []
    shown: list[str] = []
    for name, path in destinations:
        chosen = _format(name)
        try:
            # Files are read later and elsewhere: their lines may be longer, and take no colour.
            room = width if path is None else width or _FILE_WIDTH
            text = chosen.render(diagnosis, width=room, color=color and path is None)
        except Exception as error:  # one broken format must not take the other reports with it
            failed.append(f"The {name} report failed: {type(error).__name__}: {error}.")
            continue
        if path is None:
            encoding = "ascii" if ascii_only else getattr(stream, "encoding", None) or "utf-8"
            shown.append(for_encoding(text, encoding))
            continue
        try:
            _write_whole(path, text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            failed.append(
                f"The {name} report cannot be written to {path}: {reason}. "
                "Name a file you may write to, as --report FORMAT:PATH."
            )
    try:
        _show("".join(shown), stream)
    finally:
        if failed:
            raise ProbeError("\n".join(failed))


def _show(text: str, stream: TextIO | None) -> None:
    if not text:
        return
    if stream is None or stream.closed:
        raise OSError(errno.EBADF, "it is closed")
    stream.write(text)
    stream.flush()


def _write_whole(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; readers see the old file or the whole new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout: nothing to put in its place
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder", str(path))
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    target = path.resolve()  # through a symbolic link, so that the link stays one
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
    try:
        with os.fdopen(
            handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n"
        ) as file:
            file.write(text)
        os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    # The umask can only be read by setting it; mkstemp's 0600 would hide the report from others.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _warn(message: str) -> None:
    print(message, file=sys.stderr)
