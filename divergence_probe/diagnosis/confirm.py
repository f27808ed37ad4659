"""Which re-runs would prove a cause, and what their outcomes prove; plain data only.

What "alone stops it" means here. A re-run is *stable* when what the first run was diagnosed for is
gone: for a divergence, nothing non-finite and no explosion, a support loss no higher at the end
than at the start, norms within a small factor of where the task began unless that loss fell, and no
rise beyond the edge of stability in the last step; for any other finding, that its cause is not
found again, and nothing worse came in its place. A cause is confirmed when the control (nothing
changed) shows the first run's symptom again, one of the cause's own interventions is stable, and no
rival explains it as well: a rival that leaves the learning rate alone refutes it by being stable
with an end at least as good; the smaller learning rate, which calms nearly anything, only by an end
that is much better (half the loss). Where the smaller learning rate is itself the proof, any stable
rival refutes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from divergence_probe.diagnosis.analysis import DIVERGED
from divergence_probe.diagnosis.diagnosis import Diagnosis
from divergence_probe.rules.finding import Finding, Severity

CONTROL = "control"
SMALLER_RATE = "learning-rate/10"

#: The interventions that remove a cause, the most telling first.
PROOFS: Mapping[str, tuple[str, ...]] = {
    "stale-running-stats": ("batch-statistics", "recalibrated-statistics"),
    "running-stats-leak": ("cloned-buffers",),
    "train-eval-mismatch": ("one-mode",),
    "mode-not-propagated": ("one-mode",),
    "tiny-bn-batch": ("group-normalization",),
    "double-bn-update": ("no-checkpointing",),
    "checkpoint-recompute": ("no-checkpointing",),
    "compiled-base-weights": ("uncompiled",),
    "inner-lr-too-high": (SMALLER_RATE,),
    "optimizer-state-carryover": ("fresh-optimizer-state",),
    "gradient-accumulation": ("cleared-gradients",),
    "low-precision": ("float64",),
    "adam-sqrt-zero": ("eps-under-sqrt",),
    "no-meta-gradient": ("connected-to-base",),
}

#: A stable task's weights stay within this factor of where they began.
_GROWTH = 3.0
#: Step size times curvature above which a step goes further up than it came down.
_EDGE = 2.0
#: A last loss this much above the lowest is rising.
_RISE = 1.1
_MUCH_BETTER = 0.5
#: Numbers this close (relative): the change had nothing to act on.
_UNCHANGED = 1e-3
_MOST_RUNS = 6


@dataclass(frozen=True)
class Measured:
    """One re-run, as far as the task (or outer step) in question.

    Attributes:
        ended: ``"reached"``, ``"not reached"``, ``"timed out"`` or ``"failed"``.
        findings: what the rules say of it.
        largest_norm: the largest parameter norm at the task's end; nan where nothing was recorded.
        layer: the parameter it belongs to.
        growth: the largest ratio of a parameter's norm at the task's end to its start.
        losses: support losses of the task, in order.
        instability: step size times curvature at its last step; nan unknown.
        seconds: how long it took.
    """

    ended: str
    findings: tuple[Finding, ...] = ()
    largest_norm: float = math.nan
    layer: str | None = None
    growth: float = math.nan
    losses: tuple[float, ...] = ()
    instability: float = math.nan
    seconds: float = 0.0


@dataclass(frozen=True)
class Ruling:
    """What the re-runs prove.

    Attributes:
        confirmed: whether the root cause is proved.
        reason: in a sentence.
    """

    confirmed: bool
    reason: str


def symptom(diagnosis: Diagnosis) -> Finding | None:
    """The finding whose task (or outer step) the re-runs go to; None without a root cause.

    Of a divergence it is the first explosion the root cause explains, else its own finding.
    """
    cause = diagnosis.root_cause
    if cause is None or not cause.findings:
        return None
    explained = [diagnosis.findings[index] for index in cause.findings]
    if diagnosis.verdict == "diverged":
        exploded = [finding for finding in explained if _explosion(finding)]
        exploded = exploded or [finding for finding in diagnosis.findings if _explosion(finding)]
        if exploded:
            return min(exploded, key=lambda f: (_or_late(f.task), _or_late(f.step)))
    return explained[0]


def plan(diagnosis: Diagnosis) -> tuple[str, ...]:
    """Names of the interventions to re-run under, the cause's own first; empty for no proof.

    Rivals are what the other findings suggest, batch statistics where BatchNorm ran on running
    ones, and, of a divergence, the smaller learning rate.
    """
    cause = diagnosis.root_cause
    if cause is None or cause.cause not in PROOFS or diagnosis.verdict not in _JUDGED:
        return ()
    names = list(PROOFS[cause.cause])
    for finding in diagnosis.findings:
        if finding.severity > Severity.INFO and finding.cause is not None:
            names += PROOFS.get(finding.cause, ())[:1]
    if diagnosis.verdict == "diverged":
        if any("eval" in m for row in diagnosis.batch_norm for m in row.modes.values()):
            names.append("batch-statistics")
        names.append(SMALLER_RATE)
    elif cause.cause != "inner-lr-too-high":
        names = [name for name in names if name != SMALLER_RATE]
    return tuple(dict.fromkeys(names))[:_MOST_RUNS]


_JUDGED = ("diverged", "suspect")


def outcome(run: Measured, first: Diagnosis) -> str:
    """How a re-run ended, in a word or two; ``"stable"`` where the trouble is gone."""
    exploded = any(_explosion(finding) for finding in run.findings)
    if exploded:  # whatever came after: a script that stops at NaN has diverged too
        return "diverged"
    if run.ended != "reached":
        return run.ended
    if first.verdict == "diverged":
        return "stable" if _calm(run) else "unsteady"
    return "as before" if _found_again(run, first) else "stable"


def judge(first: Diagnosis, runs: Mapping[str, Measured]) -> Ruling:
    """What the re-runs prove of the first run's root cause.

    Args:
        first: the diagnosis of the first run.
        runs: by intervention, :data:`CONTROL` among them.
    """
    cause = first.root_cause
    assert cause is not None
    outcomes = {name: outcome(run, first) for name, run in runs.items()}
    again = "diverged" if first.verdict == "diverged" else "as before"
    control = outcomes.get(CONTROL, "not run")
    if control != again and not (again == "as before" and control == "diverged"):
        return Ruling(
            False,
            f"the control run did not reproduce the trouble ({control}): the script is not "
            "deterministic, or its surroundings changed; seed it, and see what it reads",
        )
    proofs = [name for name in PROOFS.get(cause.cause, ()) if outcomes.get(name) == "stable"]
    if not proofs:
        return Ruling(False, _without_proof(cause.cause, runs))
    best = min(proofs, key=lambda name: _end(runs[name]))
    rivals = [name for name in runs if name != CONTROL and name not in PROOFS[cause.cause]]
    for rival in rivals:
        if outcomes[rival] == "stable" and _refutes(rival, runs[rival], best, runs[best]):
            return Ruling(False, f"the task is as stable with {rival} as with {best}")
    alone = proofs[0] if len(proofs) == 1 else f"each of {' and '.join(proofs)}"
    return Ruling(True, f"{alone} alone stops it")


def _without_proof(cause: str, runs: Mapping[str, Measured]) -> str:
    """Why nothing proves ``cause``: what removes it did not help, or had nothing to change."""
    for name in PROOFS.get(cause, ()):
        if name in runs and _unchanged(runs[name], runs[CONTROL]):
            return f"{name} changes nothing in this loop"
    return f"no re-run without {cause} was stable"


def _unchanged(run: Measured, control: Measured) -> bool:
    """Whether a task's first step went as in the control, or, with no loss seen, its end did.

    Later steps of an explosion tell rounding apart.
    """
    if run.ended != control.ended or len(run.losses) != len(control.losses):
        return False
    pairs = [*zip(run.losses[:2], control.losses[:2], strict=True)]
    pairs = pairs or [(run.largest_norm, control.largest_norm)]
    return all(math.isclose(one, other, rel_tol=_UNCHANGED) for one, other in pairs)


def _refutes(rival: str, run: Measured, proof: str, proved: Measured) -> bool:
    if proof == SMALLER_RATE:
        return True
    if rival == SMALLER_RATE:
        return _end(run) < _MUCH_BETTER * _end(proved)
    return _end(run) <= _end(proved)


def _end(run: Measured) -> float:
    """The support loss a task ends with; infinite where unknown."""
    return run.losses[-1] if run.losses and not math.isnan(run.losses[-1]) else math.inf


def _calm(run: Measured) -> bool:
    if math.isinf(run.largest_norm):
        return False
    if not run.losses:
        return not run.growth > _GROWTH and not run.instability > _EDGE
    first, last = run.losses[0], run.losses[-1]
    if not last <= first or math.isinf(run.growth):
        return False
    rising = last > _RISE * min(run.losses)
    return not (rising and run.instability > _EDGE) and (last < first or run.growth <= _GROWTH)


def _found_again(run: Measured, first: Diagnosis) -> bool:
    cause = first.root_cause
    assert cause is not None
    known = {(f.rule, f.cause) for f in first.findings}
    return any(
        finding.cause == cause.cause
        or (finding.severity is Severity.ERROR and (finding.rule, finding.cause) not in known)
        for finding in run.findings
        if finding.severity > Severity.INFO
    )


def _explosion(finding: Finding) -> bool:
    return finding.rule in DIVERGED and finding.severity is Severity.ERROR


def _or_late(index: int | None) -> float:
    return math.inf if index is None else index
