"""A few words under the user's own traceback, where an exception came out of an inner loop."""

from __future__ import annotations

from divergence_probe.diagnosis.diagnosis import Diagnosis


def explain(error: BaseException, diagnosis: Diagnosis) -> str | None:
    """What the exception means for the inner loop, ready to print; None for nothing to say.

    Args:
        error: what ended the script.
        diagnosis: of the run up to there.
    """
    raised = diagnosis.exception
    if raised is None or not raised.inner_loop or not isinstance(error, Exception):
        return None
    done = diagnosis.summary
    return (
        f"probe: {type(error).__name__} was raised inside an inner loop (task "
        f"{max(done.tasks - 1, 0)}; {done.inner_steps:,} inner steps were taken before it)."
    )
