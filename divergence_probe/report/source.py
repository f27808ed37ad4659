"""The user's own source lines around the marks of a story, grouped into one frame a file."""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass

from divergence_probe.report.wording import one_line, short_path, split_site, visible
from divergence_probe.rules.finding import Mark

_FUNCTION = re.compile(r"(async\s+def|def)\b")
_LOOP = re.compile(r"(for|while|async\s+for)\b")


@dataclass(frozen=True)
class Line:
    """One line of source: its number from 1, its text, and what happened there."""

    number: int
    code: str
    texts: tuple[str, ...] = ()

    @property
    def indent(self) -> int:
        """Number of leading blanks."""
        return len(self.code) - len(self.code.lstrip())

    @property
    def extent(self) -> int:
        """Number of characters of code proper: neither indentation nor a comment at its end."""
        return len(re.sub(r"\s+#[^'\"]*$", "", self.code.strip()))


@dataclass(frozen=True)
class Frame:
    """The lines of one file, in order; empty where the file cannot be read.

    Attributes:
        path: the file, relative to the working directory where it lies inside it.
        site: ``path:line`` of the most telling mark.
        lines: the marked lines with the function and loop they stand in.
        unread: marks whose line could not be read, as ``(path:line, text)``.
    """

    path: str
    site: str
    lines: tuple[Line, ...]
    unread: tuple[tuple[str, str], ...] = ()


def frames(marks: Sequence[Mark]) -> list[Frame]:
    """One frame a file, in the order the marks first name the files."""
    by_path: dict[str, list[tuple[int | None, str]]] = {}
    for mark in marks:
        path, line = split_site(mark.site)
        by_path.setdefault(path, []).append((line, one_line(mark.text)))
    return [_frame(path, entries) for path, entries in by_path.items()]


def _frame(path: str, entries: list[tuple[int | None, str]]) -> Frame:
    shown = one_line(short_path(path))
    source = _source(path)
    texts: dict[int, list[str]] = {}
    unread = []
    for number, text in entries:
        if number is not None and 1 <= number <= len(source):
            texts.setdefault(number, []).append(text)
        else:
            unread.append((shown if number is None else f"{shown}:{number}", text))
    numbers = set(texts)
    for number in texts:
        numbers |= _surroundings(source, number)
    lines = _dedented(
        [(number, source[number - 1], texts.get(number, [])) for number in sorted(numbers)]
    )
    first = entries[0][0]
    return Frame(shown, shown if first is None else f"{shown}:{first}", lines, tuple(unread))


def _source(path: str) -> list[str]:
    """The lines of a file, made visible; none where it cannot be read."""
    try:
        linecache.checkcache(path)
        return [visible(line.rstrip()).replace("\n", " ") for line in linecache.getlines(path)]
    except (ValueError, OSError, SyntaxError):  # a name no file can have, or an unreadable encoding
        return []


def _surroundings(source: list[str], number: int) -> set[int]:
    """Line numbers of the function and of the innermost loop that line ``number`` stands in."""
    found: set[int] = set()
    code = source[number - 1]
    depth = len(code) - len(code.lstrip())
    loop_seen = False
    for above in range(number - 1, 0, -1):
        code = source[above - 1]
        stripped = code.lstrip()
        if (
            not stripped
            or stripped.startswith(("#", ")", "]", "}"))
            or len(code) - len(stripped) >= depth
        ):
            continue
        depth = len(code) - len(stripped)
        if _FUNCTION.match(stripped):
            return found | {above}
        if _LOOP.match(stripped) and not loop_seen:
            loop_seen = True
            found.add(above)
        if depth == 0:
            break
    return found


def _dedented(lines: list[tuple[int, str, list[str]]]) -> tuple[Line, ...]:
    """The lines without the indentation they all share, so that deep code leaves room for words."""
    shared = min(
        (len(code) - len(code.lstrip()) for _, code, _ in lines if code.strip()), default=0
    )
    return tuple(
        Line(number, code[shared:], tuple(dict.fromkeys(texts))) for number, code, texts in lines
    )
