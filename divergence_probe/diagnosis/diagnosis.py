"""The answer: verdict, root cause, findings and the evidence behind them, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from divergence_probe.rules.finding import Finding, Mark

Verdict = Literal["healthy", "suspect", "diverged", "unobserved"]
Confidence = Literal["inferred", "confirmed"]


@dataclass(frozen=True)
class RootCause:
    """The one cause that explains the earliest and strongest evidence.

    Attributes:
        cause: a name of the catalogue of causes.
        confidence: ``"confirmed"`` only when an intervention alone stopped the divergence.
        summary: why, in one or two sentences a person understands.
        fix: what to change, in code.
        findings: indices into :attr:`Diagnosis.findings`, the telling one first.
        marks: the user's lines that tell the story, in order.
    """

    cause: str
    confidence: Confidence
    summary: str
    fix: str
    findings: tuple[int, ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What was watched.

    Attributes:
        tasks: number of tasks (inner loops) seen.
        inner_steps: number of inner steps seen.
        outer_steps: number of outer (meta) steps seen.
        layers: number of modules that own a parameter that was measured; of tensors in no module,
            a weight and its bias are one.
        adapters: how the loops were seen, such as ``("higher",)``.
        overhead_fraction: time spent in the probe over the run's time, 0 to 1.
        ranks: number of processes that recorded.
        optimizers: inner optimizers, such as ``("SGD",)``; empty where hand-written.
        learning_rates: smallest and largest inner learning rate seen, or None.
        incomplete: what was not seen, one sentence each, with how to see it.
        seconds: how long the run was watched; a share of very few says nothing.
    """

    tasks: int = 0
    inner_steps: int = 0
    outer_steps: int = 0
    layers: int = 0
    adapters: tuple[str, ...] = ()
    overhead_fraction: float = 0.0
    ranks: int = 1
    optimizers: tuple[str, ...] = ()
    learning_rates: tuple[float, float] | None = None
    incomplete: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class NormTrace:
    """One parameter's norm through the inner steps of one task.

    Attributes:
        layer: parameter name in the user's model, such as ``features.conv1.weight``.
        task: the task shown.
        norms: ``[before, after step 0, after step 1, ...]`` Frobenius norms; may hold inf or nan.
        first_to_grow: step at which growth passed the bound, or None.
    """

    layer: str
    task: int
    norms: tuple[float, ...]
    first_to_grow: int | None = None


@dataclass(frozen=True)
class BatchNormRow:
    """One BatchNorm layer's statistics against the batch's own, worst over the run.

    Attributes:
        layer: module name.
        modes: effective modes seen by phase, such as ``{"support": "eval", "query": "eval"}``;
            ``"train→eval"`` is one after the other, ``"train+eval"`` both in turns.
        batches_seen: the base layer's ``num_batches_tracked`` when last evaluated, or None.
        mean_distance: RMS over channels of (running mean - batch mean) in batch standard
            deviations; nan where it was not measured.
        variance_ratio: geometric mean over channels of running / batch variance; nan likewise.
        base_buffers: ``"cloned"``, ``"shared"``, ``"moved"``, ``"restored"`` or ``"own"``.
        values_per_channel: the fewest values one channel was normalised over.
    """

    layer: str
    modes: Mapping[str, str]
    batches_seen: int | None
    mean_distance: float
    variance_ratio: float
    base_buffers: str
    values_per_channel: int | None = None


@dataclass(frozen=True)
class Health:
    """How well the run behaved: the numbers that make silence evidence.

    Attributes:
        largest_growth: largest ratio of a parameter's norm after a task to before it.
        largest_growth_layer: whose.
        instability_margin: largest step size x curvature seen (2 is the edge; beyond it, of steps
            over which loss and gradient grew), or None.
        running_statistics_distance: largest BN mean distance while in eval mode, or None.
        support_loss: mean support loss at a task's first and last step, or None.
    """

    largest_growth: float | None = None
    largest_growth_layer: str | None = None
    instability_margin: float | None = None
    running_statistics_distance: float | None = None
    support_loss: tuple[float, float] | None = None


@dataclass(frozen=True)
class Intervention:
    """One re-run of the script with one thing changed.

    Attributes:
        name: what was changed, such as ``"batch-statistics"``; ``"control"`` for none.
        description: the change in words.
        outcome: ``"diverged"``, ``"stable"``, ``"not reached"``, ``"timed out"`` or ``"failed"``.
        largest_norm: the largest parameter norm at the end of the task; may be inf or nan.
        layer: the layer it belongs to, or None.
        seconds: how long the re-run took.
    """

    name: str
    description: str
    outcome: str
    largest_norm: float
    layer: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class ExceptionReport:
    """The exception that ended the script, or was raised inside an inner loop.

    Attributes:
        type: class name.
        message: its text.
        inner_loop: whether it was raised inside an inner loop.
        site: user line that raised, or None.
    """

    type: str
    message: str
    inner_loop: bool
    site: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything a report shows. Produced once, rendered by many."""

    verdict: Verdict
    summary: Summary
    findings: tuple[Finding, ...] = ()
    root_cause: RootCause | None = None
    norms: tuple[NormTrace, ...] = ()
    batch_norm: tuple[BatchNormRow, ...] = ()
    health: Health = field(default_factory=Health)
    interventions: tuple[Intervention, ...] = ()
    exception: ExceptionReport | None = None
    script_exit: int = 0
    recording: str | None = None
    title: str | None = None
