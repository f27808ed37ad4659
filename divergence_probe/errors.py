"""The errors a person can meet, each with what happened, where, what to do, and its exit code."""

from __future__ import annotations

import os
import traceback

_TRACEBACK = "DIVERGENCE_PROBE_TRACEBACK"


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


def fault_of_ours(error: Exception) -> str:
    """What to say of an exception that nobody foresaw; with its traceback where that is asked for.

    Set ``DIVERGENCE_PROBE_TRACEBACK=1`` in the environment to ask.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = (
        f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}, line "
        f"{frame.lineno}). This is a fault of the probe's own: please report it, with the "
        f"traceback that {_TRACEBACK}=1 in the environment shows."
    )
    if os.environ.get(_TRACEBACK):
        return "".join(traceback.format_exception(error)) + said
    return said
