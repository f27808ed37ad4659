"""What a stream can show: colour, its width, and whether a line on it may be redrawn."""

from __future__ import annotations

import os
from typing import TextIO

DEFAULT_WIDTH = 80


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal; False where it is closed or no real stream."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError, OSError):
        return False


def wants_color(stream: TextIO) -> bool:
    """Whether to colour: NO_COLOR forbids, FORCE_COLOR asks for it, TERM=dumb cannot."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR") not in (None, "", "0", "false"):
        return True
    return can_redraw(stream)


def can_redraw(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that understands escape sequences."""
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def width_of(stream: TextIO) -> int:
    """Cells of a line: COLUMNS, else the terminal's, else 80."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    if not is_terminal(stream):
        return DEFAULT_WIDTH
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    except (OSError, ValueError):
        return DEFAULT_WIDTH
