"""What a rule says: one small immutable record, the same live, on disk and in every report."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Severity(enum.IntEnum):
    """How much a finding matters.

    ``ERROR``: the result is wrong or lost. ``WARNING``: very likely not what was meant.
    ``INFO``: worth knowing, never a reason to fail.
    """

    INFO = 1
    WARNING = 2
    ERROR = 3

    @property
    def label(self) -> str:
        """The lower-case name used in reports and JSON."""
        return self.name.lower()

    @classmethod
    def of(cls, label: str) -> Severity:
        """The severity named ``label`` (``"info"``, ``"warning"`` or ``"error"``).

        Raises:
            KeyError: for any other label.
        """
        return cls[label.upper()]


@dataclass(frozen=True)
class Mark:
    """One line of the user's code with what happened there.

    Attributes:
        site: ``path:line`` in the user's code.
        text: what happened at that line, in a few words.
    """

    site: str
    text: str


@dataclass(frozen=True)
class Finding:
    """What one rule saw, first place first.

    Attributes:
        rule: the rule's code, such as ``"BN001"``.
        name: the rule's name, which says what is wrong.
        severity: see :class:`Severity`.
        message: one sentence with the numbers that matter.
        cause: a cause of the catalogue, or None where the rule only sees a symptom.
        layer: dotted name in the user's own model, or None.
        task: task index within the run, from 0, or None.
        step: inner step within the task, from 0, or None.
        phase: ``"support"``, ``"query"``, ``"outer"`` or None.
        rank: the process's rank.
        count: in how many places (tasks, for per-task rules) it was seen.
        unit: what is counted, such as ``"task"``.
        evidence: name to number or short text; what the rule compared.
        fix: what to change, in code, or an empty string.
        marks: lines of the user's code that belong to it, the most telling first.
        layers: every layer concerned, in forward order.
    """

    rule: str
    name: str
    severity: Severity
    message: str
    cause: str | None = None
    layer: str | None = None
    task: int | None = None
    step: int | None = None
    phase: str | None = None
    rank: int = 0
    count: int = 1
    unit: str = "time"
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    fix: str = ""
    marks: tuple[Mark, ...] = ()
    layers: tuple[str, ...] = ()
