"""The errors a person can meet, each with what happened, where, what to do, and its exit code."""

from __future__ import annotations


class ProbeError(Exception):
    """Base of all errors shown to a person; the message says what, where and the remedy."""

    exit_code = 2


class UsageError(ProbeError):
    """The command line, an option or an argument cannot be used as given."""


class RecordingError(ProbeError):
    """A recording cannot be written or read."""


class DivergenceDetected(ProbeError):  # noqa: N818 - it reads as what happened, not as our failure
    """Raised inside a watched loop when ``raise_on`` is reached; carries the findings.

    Args:
        message: the report's short form, ready to print.
        findings: the findings that reached the asked severity, the earliest first.
    """

    exit_code = 1

    def __init__(self, message: str, findings: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings
