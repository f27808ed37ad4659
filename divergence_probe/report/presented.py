"""A diagnosis that shows itself: in a terminal, in a notebook, as text and as a dict."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from divergence_probe.diagnosis.diagnosis import Diagnosis

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True, repr=False)
class PresentedDiagnosis(Diagnosis):
    """The same data as :class:`Diagnosis`, with rich, notebook, text and dict forms.

    ``rich.print(diagnosis)`` draws the report at the terminal's width, a notebook cell that ends
    in one shows the HTML report, ``str()`` gives the plain text and ``to_dict()`` the JSON
    report's content.
    """

    @classmethod
    def of(cls, diagnosis: Diagnosis) -> PresentedDiagnosis:
        """``diagnosis`` with the forms added; one that has them already is returned as it is."""
        if isinstance(diagnosis, cls):
            return diagnosis
        return cls(**{field.name: getattr(diagnosis, field.name) for field in fields(Diagnosis)})

    def to_dict(self) -> dict[str, Any]:
        """The JSON report's content: plain dicts, lists, strings and finite numbers."""
        from divergence_probe.report.json_report import to_dict

        return to_dict(self)

    def __repr__(self) -> str:
        """One line; ``print`` shows the report."""
        cause = f", {self.root_cause.cause}" if self.root_cause else ""
        findings = len(self.findings)
        return f"<Diagnosis: {self.verdict}{cause}, {findings} findings; print it for the report>"

    def __str__(self) -> str:
        """The plain terminal report, 80 columns wide."""
        from divergence_probe.report.terminal import render

        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The terminal report at the width of the console it is printed on."""
        from divergence_probe.report.terminal import renderable

        yield renderable(self)

    def _repr_html_(self) -> str:
        from divergence_probe.report.html import fragment

        return fragment(self)
