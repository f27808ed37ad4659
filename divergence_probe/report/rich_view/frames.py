"""Source frames: the user's lines with what happened there, drawn as good compilers do."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from divergence_probe.report.rich_view.layout import cropped, wrapped
from divergence_probe.report.source import Frame, Line

_RAIL = "dim"
_POINTER = "red"


def frame_lines(frame: Frame, width: int, conclusion: Text | None = None) -> list[Text]:
    """One file's frame, ``width`` cells wide; the conclusion closes it."""
    number_width = max([len(str(line.number)) for line in frame.lines], default=1)
    margin = " " * (number_width + 2)
    rail = Text(margin) + Text("│ ", style=_RAIL)
    head = (
        Text(margin)
        + Text("╭─ ", style=_RAIL)
        + Text(cropped(frame.site, width - len(margin) - 3), style="bold")
    )
    out = [head]
    previous: Line | None = None
    for line in frame.lines:
        if previous is not None and line.number > previous.number + 1:
            out.append(Text(margin) + Text("┆", style=_RAIL))
        out += _source_line(line, number_width, width)
        out += _pointers(line, rail, width)
        previous = line
    for site, text in frame.unread:
        out += _after_rail(rail, Text(f"{site}: {text}"), width)
    if conclusion is None:
        return [*out, Text(margin) + Text("╰─", style=_RAIL)]
    closing = wrapped(conclusion, width - len(margin) - 3)
    out.append(Text(margin) + Text("╰─ ", style=_RAIL) + closing[0])
    return out + [Text(margin + "   ") + line for line in closing[1:]]


def _source_line(line: Line, number_width: int, width: int) -> list[Text]:
    gutter = Text(f" {line.number:>{number_width}} ", style="bold" if line.texts else "dim") + Text(
        "│ ", style=_RAIL
    )
    code = cropped(line.code, width - gutter.cell_len)
    return [gutter + Text(code, style="" if line.texts else "dim")]


def _pointers(line: Line, rail: Text, width: int) -> list[Text]:
    """An underline below the code and one branch a text: what happened at this line."""
    if not line.texts:
        return []
    # Deeply indented code would leave no room for words: past a third of the width the branch
    # moves left.
    indent = min(line.indent, max(0, (width - rail.cell_len) // 3))
    stretch = min(cell_len(line.code.strip()[: line.extent]), width - rail.cell_len - line.indent)
    lead = line.indent - indent
    underline = "─" * lead + "─" * max(1, stretch - 1) if lead else "─" * max(0, stretch - 1)
    out = [rail + Text(" " * indent) + Text("┬" + underline, style=_POINTER)]
    for number, text in enumerate(line.texts):
        last = number == len(line.texts) - 1
        branch = Text(" " * indent) + Text("╰─ " if last else "├─ ", style=_POINTER)
        follow = Text(" " * indent) + Text("   " if last else "│  ", style=_POINTER)
        room = width - rail.cell_len - indent - 3
        for row, piece in enumerate(wrapped(Text(text), room)):
            out.append(rail + (branch if row == 0 else follow) + piece)
    return out


def _after_rail(rail: Text, text: Text, width: int) -> list[Text]:
    return [rail + piece for piece in wrapped(text, width - rail.cell_len)]


def story_lines(frames: Sequence[Frame], width: int, conclusion: Text | None) -> list[Text]:
    """All frames of a story, the conclusion at the foot of the last."""
    out: list[Text] = []
    for number, frame in enumerate(frames):
        last = number == len(frames) - 1
        out += ([Text("")] if number else []) + frame_lines(
            frame, width, conclusion if last else None
        )
    return out
