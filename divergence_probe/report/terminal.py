"""The terminal report: verdict, why, where, what to change, how sure; then the evidence."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from divergence_probe.diagnosis.diagnosis import Diagnosis

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

FORMAT = "rich"
DEFAULT_WIDTH = 80


class _Page:
    """A diagnosis that rich lays out for the width it is printed at."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self.diagnosis = diagnosis

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from divergence_probe.report.rich_view.page import page

        yield from page(self.diagnosis, options.max_width)


def renderable(diagnosis: Diagnosis) -> RenderableType:
    """The report for ``rich.print`` or a rich layout; it adapts to their width."""
    return _Page(diagnosis)


def render(diagnosis: Diagnosis, *, width: int | None = None, color: bool = False) -> str:
    """The report as text, ``width`` cells wide (80 by default); escapes only with ``color``."""
    # rich takes some 50 ms to import: only a report that is really drawn pays for it.
    from divergence_probe.report.rich_view import Console
    from divergence_probe.report.rich_view.page import page

    width = width or DEFAULT_WIDTH
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        force_jupyter=False,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    for line in page(diagnosis, width):
        line.rstrip()
        console.print(line, soft_wrap=True, no_wrap=True)
    return stream.getvalue()
