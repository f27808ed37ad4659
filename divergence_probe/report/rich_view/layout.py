"""Lines, wrapping and aligned columns: text that never runs past the width it was given.

rich's own Table squeezes the widest column when room is short, which cuts numbers in two; here the
caller drops whole columns instead, and only names are shortened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

GUTTER = 3
_wrapping = Console(width=80, color_system=None, force_jupyter=False)

VERDICT_STYLES = {
    "diverged": "bold white on red",
    "suspect": "bold black on yellow",
    "healthy": "bold black on green",
    "unobserved": "bold black on cyan",
}
SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def wrapped(text: Text, width: int, indent: str = "", hanging: str | None = None) -> list[Text]:
    """``text`` in lines of ``width`` cells, the first after ``indent``, others ``hanging``."""
    hanging = " " * cell_len(indent) if hanging is None else hanging
    room = max(8, width - max(cell_len(indent), cell_len(hanging)))
    lines = text.wrap(_wrapping, room, overflow="fold") if text.plain else [Text("")]
    out = []
    for number, line in enumerate(lines):
        line.rstrip()
        out.append(Text(indent if number == 0 else hanging) + line)
    return out


def labelled(label: str, paragraphs: Iterable[Text], width: int) -> list[Text]:
    """Paragraphs beside a short bold label: `` Why   because ...``."""
    lines: list[Text] = []
    for paragraph in paragraphs:
        head = Text(" ") + Text(f"{label:<6}", style="bold") if not lines else Text(" " * 7)
        body = wrapped(paragraph, width - 7)
        lines += [
            (head if number == 0 else Text(" " * 7)) + line for number, line in enumerate(body)
        ]
    return lines


def code_lines(code: str, width: int) -> list[str]:
    """Lines of code with those comments that are too long on lines of their own, each with a #."""
    lines: list[str] = []
    for line in code.split("\n"):
        if cell_len(line) <= width or "#" not in line:
            lines.append(line)
            continue
        before, _, comment = line.partition("#")
        indent = before[: len(before) - len(before.lstrip())]
        body = wrapped(Text(comment.strip()), width, f"{indent}# ", f"{indent}# ")
        lines += [piece.plain for piece in body]
        lines += [before.rstrip()] if before.strip() else []
    return lines


def heading(title: str, width: int, note: str = "") -> list[Text]:
    """A section's bold title, with a dim note beside it where there is room, else below it."""
    line = Text(" ") + Text(title, style="bold")
    if note and line.cell_len + 2 + cell_len(note) <= width:
        return [line + Text("  ") + Text(note, style="dim")]
    return [line, *wrapped(Text(note, style="dim"), width, " " * GUTTER)] if note else [line]


def flowed(parts: Sequence[Text], width: int, indent: str, between: str = " · ") -> list[Text]:
    """Short phrases set one after the other; a line breaks only between two phrases."""
    lines = [Text(indent)]
    for part in parts:
        fresh = lines[-1].plain == indent or not lines[-1].plain.strip()
        joint = "" if fresh else between
        if not fresh and lines[-1].cell_len + cell_len(joint) + part.cell_len > width:
            lines.append(Text(" " * cell_len(indent)))
            joint = ""
        lines[-1] = lines[-1] + Text(joint, style="dim") + part
    return [piece for line in lines for piece in _folded(line, width, cell_len(indent))]


def _folded(line: Text, width: int, indent: int) -> list[Text]:
    if line.cell_len <= width:
        return [line]
    return wrapped(line[indent:], width, " " * indent)


def columns(
    rows: Sequence[Sequence[Text]], right: Sequence[bool], width: int, gap: int = 2
) -> list[Text]:
    """Rows of cells as aligned lines; ``right`` says which columns are set flush right.

    The caller has made sure that the columns fit; a line that is too long all the same is cut.
    """
    widths = [max(row[i].cell_len for row in rows) for i in range(len(right))] if rows else []
    lines = []
    for row in rows:
        line = Text(" " * GUTTER)
        for i, (cell, size, flush_right) in enumerate(zip(row, widths, right, strict=True)):
            padding = Text(" " * (size - cell.cell_len))
            line += Text(" " * gap if i else "") + (
                padding + cell if flush_right else cell + padding
            )
        line.rstrip()
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return lines


def cropped(text: str, width: int) -> str:
    """``text`` cut to ``width`` cells, an ellipsis at its end where something is missing."""
    return (
        text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)).rstrip() + "…"
    )


def short_name(name: str, width: int) -> str:
    """A dotted name cut to ``width`` cells from the left: its end tells layers apart."""
    if cell_len(name) <= width:
        return name
    tail = name
    while tail and cell_len(tail) > width - 1:
        tail = tail[1:]
    dot = tail.find(".")
    # Cut at a dot where that costs little, so that the name reads as a name.
    return "…" + (tail[dot:] if 0 <= dot <= 6 and len(tail) - dot > 4 else tail)
