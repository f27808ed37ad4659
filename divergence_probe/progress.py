"""One line on the terminal while the script runs: tasks, inner steps, findings so far.

Script and line share the terminal, so the line gives way: it is drawn only while the cursor stands
at the start of a row, and taken away before anything else is written. It needs no thread of its
own, which the script could see.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from divergence_probe.terminal import can_redraw, is_terminal, width_of

if TYPE_CHECKING:
    from divergence_probe.diagnosis.analysis import Analysis

_SECONDS_BETWEEN = 0.2
_ERASE = "\r\x1b[K"


class ProgressLine:
    """The line; does nothing where stderr is no terminal.

    Args:
        out: the script's stdout.
        err: the script's stderr, where the line is drawn.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr
        self._process = os.getpid()
        self._write: Callable[[str], int] | None = None
        self._watched: list[TextIO] = []
        self._fresh_row = True
        self._shown = False
        self._drawn_at = -_SECONDS_BETWEEN

    def start(self) -> None:
        """Begin: from now on, what the script writes makes the line give way."""
        if not can_redraw(self._err):
            return
        self._write = self._err.write
        for stream in (self._out, self._err):
            if is_terminal(stream):
                self._watch(stream)

    def update(self, analysis: Analysis) -> None:
        """Show how far the run is; at most five times a second."""
        now = time.monotonic()
        if self._write is None or not self._fresh_row or now - self._drawn_at < _SECONDS_BETWEEN:
            return
        self._drawn_at = now
        text = _words(analysis)[: max(width_of(self._err) - 1, 0)]
        # Back to the row's start, so that what the watch below cannot see overwrites the line.
        self._put(f"\r{text}\x1b[K\r")
        self._shown = True

    def close(self) -> None:
        """Take the line away for good."""
        self._erase()
        for stream in self._watched:
            with contextlib.suppress(AttributeError):
                del stream.write  # the instance's; the class's own shows again
        self._watched = []
        self._write = None

    def _watch(self, stream: TextIO) -> None:
        original = stream.write

        def write(text: str, /) -> int:
            if self._process == os.getpid():  # a forked child has no line
                self._erase()
                if text:
                    self._fresh_row = text.endswith("\n")
            return original(text)

        try:
            # On the instance: sys.stdout stays the very object the script expects.
            stream.write = write  # type: ignore[method-assign]
        except AttributeError:  # no stream of python's own
            return
        self._watched.append(stream)

    def _erase(self) -> None:
        if self._shown:
            self._shown = False
            self._put(_ERASE)

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that has gone away
            if self._write is not None:
                self._write(text)
                self._err.flush()


def _words(analysis: Analysis) -> str:
    seen, findings = analysis.collector, analysis.engine.findings
    errors = sum(finding.severity.label == "error" for finding in findings)
    told = f"{len(findings)} findings, {errors} of them errors" if findings else "no finding so far"
    return f"probe: {seen.tasks:,} tasks, {seen.inner_steps:,} inner steps, {told}"
