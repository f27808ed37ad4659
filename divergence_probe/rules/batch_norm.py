"""BatchNorm statistics: which were used, and whether they were ever trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from divergence_probe.record.schema import Flags
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.quantities import farness
from divergence_probe.thresholds import Thresholds

_TRAIN_FIX = "net.train()  # before the inner loop: batch statistics, as in meta-training\n"
_QUERY_FIX = "net.train()  # for the query, too: batch statistics, as in the inner loop\n"
_STEPS_FIX = (
    "stats = running[min(step, trained_steps - 1)]  # or no more steps than in meta-training\n"
)
_RECALIBRATE_FIX = (
    "# or: nn.BatchNorm2d(channels, track_running_stats=False)\n"
    "# or: recalibrate the running statistics on the support set before adapting"
)


class _EvalStatistics(Rule):
    """What the two rules on evaluated running statistics share."""

    _switched: str | None = None
    _untrained: ClassVar[bool]

    def _note_switch(self, frame: Frame) -> None:
        """Remember where eval mode was last switched on for a whole model."""
        for event in frame.events("mode"):
            self._switched = event.site if event.data.get("mode") == "eval" else None

    def _evaluated(self, frame: Frame) -> Flags:
        """``[S, B]`` layers that ran in eval mode, on statistics that are (un)trained."""
        norm = frame.block.batch_norm
        evaluated = (norm["bn_training"] == 0) | (norm["bn_training"] == 2)
        return np.asarray(evaluated & (norm["bn_untrained"] == float(self._untrained)))

    def _findings(self, frame: Frame, evaluated: Flags, first_look: Flags) -> Iterator[Finding]:
        """One finding a task that evaluates statistics far from the batch's.

        Later steps move the weights, so a first look (``[S, B]``) at a layer judges it.
        """
        hit = evaluated & first_look & (farness(frame, self.thresholds) > 1)
        for row in frame.first_rows(hit.any(1) & ~frame.outer):
            yield self._describe(frame, row, evaluated[row], hit[row])

    def _describe(self, frame: Frame, row: int, evaluated: Flags, hit: Flags) -> Finding:
        norm, untrained = frame.block.batch_norm, self._untrained
        # Untrained statistics are wrong in every layer that evaluates them, far or not.
        columns = np.flatnonzero(evaluated if untrained else hit)
        layers = tuple(frame.normalization(int(c)) for c in columns)
        worst = int(columns[np.nanargmax(farness(frame, self.thresholds)[row, columns])])
        distance = float(norm["bn_mean_distance"][row, worst])
        ratio = math.exp(float(norm["bn_log_variance_ratio"][row, worst]))
        seen = float(norm["bn_batches"][row, columns[0]])
        of_batches = f" of {seen:.0f} batches" if seen >= 0 else ""  # (not every layer counts)
        how = (
            "running statistics that were never trained (mean 0, variance 1)"
            if untrained
            else f"running statistics{of_batches}, far from this one's"
        )
        finding = self.at(
            frame,
            row,
            f"{frame.called(layers)} evaluate{'s' * (len(layers) == 1)} {how}; at "
            f"{frame.called([frame.normalization(worst)])} the running mean is {distance:.2g} σ "
            f"from the batch's, the variance ratio {ratio:.3g}",
            f"{len(layers)} BatchNorm layer{'s' * (len(layers) > 1)} in eval mode with {how}",
            layer=layers[0],
            layers=layers,
            evidence={"mean_distance": distance, "variance_ratio": ratio, "batches_seen": seen},
            fix=self._fix(frame, row) + _RECALIBRATE_FIX,
        )
        if self._switched is None:
            return finding
        switch = Mark(self._switched, "eval mode from here on")
        return replace(finding, marks=(switch, *finding.marks))

    @staticmethod
    def _fix(frame: Frame, row: int) -> str:
        if frame.query[row]:
            return _QUERY_FIX
        return _TRAIN_FIX if frame.step[row] == 0 else _STEPS_FIX


class EvalWithUntrainedStatistics(_EvalStatistics):
    """Eval-mode BatchNorm normalises with running statistics that were never trained.

    ## What it does
    Reports a BatchNorm layer that runs in eval mode while its running statistics are still exactly
    mean 0 and variance 1, and that is far from the batch it normalises. It looks before adaptation
    moves the weights, at the query, and where statistics of a step's own take over from trained
    ones.

    ## Why it is bad
    The layer then normalises nothing: activations keep their raw scale, gradients grow with it, and
    a learning rate that was right in train mode makes the weights explode. `higher` gives every
    task its own copy of the buffers, so meta-training through it never trains the base's.

    ## Example
    ```python
    net.eval()
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(x_support), y_support))
    ```

    ## Use instead
    ```python
    net.train()    # batch statistics in the inner loop, as in meta-training
    ```

    ## References
    facebookresearch/higher#55, #103, #107; Antoniou et al., How to train your MAML, 2019,
    section 3 on BatchNorm statistics.
    """

    _untrained = True
    code = "BN001"
    name = "eval-with-untrained-running-stats"
    severity = Severity.ERROR
    cause = "stale-running-stats"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task."""
        self._note_switch(frame)
        evaluated = self._evaluated(frame)
        if evaluated.any():
            first_look = ((frame.step == 0) | frame.query)[:, None] | self._took_over(frame)
            yield from self._findings(frame, evaluated, first_look)

    def _took_over(self, frame: Frame) -> Flags:
        """``[S, B]`` layers whose step before evaluated trained statistics that fitted.

        What is far off a step later is other statistics then: no single step moves weights so far.
        """
        norm, before = frame.block.batch_norm, frame.by_task.previous(frame.support)
        fitted = (norm["bn_training"] == 0) & (norm["bn_untrained"] == 0)
        fitted &= farness(frame, self.thresholds) <= 1
        return np.asarray(fitted[before] & (before >= 0)[:, None])


class EvalWithDistantStatistics(_EvalStatistics):
    """Eval-mode BatchNorm normalises with running statistics far from the data's own.

    ## What it does
    Reports a BatchNorm layer in eval mode whose running statistics were trained, but lie far from
    the statistics of the batch it normalises: too few updates, other data, or other weights. It
    looks before adaptation moves the weights; so at a query only where the statistics were far off
    already when the task began in train mode.

    ## Why it is bad
    Activations come out shifted and scaled, and the network behind was trained on neither.

    ## Example
    ```python
    net(x_warmup)      # one batch with momentum 0.1: 90 % of the statistics are still initial
    net.eval()
    ```

    ## Use instead
    ```python
    for x, _ in loader:     # in train mode, until the statistics have settled
        net(x)
    ```

    ## References
    facebookresearch/higher#107; Schneider et al., Improving robustness against common corruptions
    by covariate shift adaptation, 2020.
    """

    _untrained = False
    code = "BN002"
    name = "eval-with-distant-running-stats"
    severity = Severity.WARNING
    cause = "stale-running-stats"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        # layers of a task that were far off when it began, though it began in train mode
        self._began_far: dict[tuple[int, int], Flags] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task."""
        self._note_switch(frame)
        evaluated = self._evaluated(frame)
        self._note_began(frame, every=bool(evaluated.any()))
        if evaluated.any():
            # in a query, too, what was seen while adapting in train mode
            first_look = (frame.step == 0)[:, None] | self._far_in_train_mode(frame)
            yield from self._findings(frame, evaluated, first_look)
        for task in frame.block.ended if self._began_far else ():
            self._began_far.pop((frame.block.rank, task), None)

    def _note_began(self, frame: Frame, every: bool) -> None:
        """Remember the layers of tasks that begin far off in train mode.

        Where nothing is evaluated in this block, only those of tasks that go on are needed.
        """
        rows = np.flatnonzero(frame.begins if every else frame.begins & frame.unfinished)
        began = frame.block.batch_norm["bn_training"][rows] == 1
        if began.any():
            began &= farness(frame, self.thresholds)[rows] > 1
        for row, layers in zip(rows[began.any(1)].tolist(), began[began.any(1)], strict=True):
            self._began_far[frame.block.rank, int(frame.task[row])] = layers

    def _far_in_train_mode(self, frame: Frame) -> Flags:
        """``[S, B]`` layers of queries that were far off before adapting, in train mode."""
        result = np.zeros(frame.block.batch_norm["bn_training"].shape, dtype=bool)
        for row in np.flatnonzero(frame.query) if self._began_far else ():
            known = self._began_far.get((frame.block.rank, int(frame.task[row])))
            if known is not None:
                result[row, : len(known)] = known
        return result


class TinyBatch(Rule):
    """BatchNorm in train mode normalises over a handful of values.

    ## What it does
    Counts the values each channel is normalised over (batch times map size).

    ## Why it is bad
    The mean of n values has a standard error of 1/sqrt(n) deviations: below 8 values the layer adds
    noise of more than a third of the signal, and with 2 values every output is plus or minus one.

    ## Example
    ```python
    nn.BatchNorm1d(64)(x)    # x: [5, 64], a 5-way 1-shot support set
    ```

    ## Use instead
    ```python
    nn.GroupNorm(8, 64)(x)
    ```

    ## References
    Wu and He, Group Normalization, 2018, figure 1.
    """

    code = "BN004"
    name = "tiny-batch-norm-batch"
    severity = Severity.WARNING
    cause = "tiny-bn-batch"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task."""
        norm = frame.block.batch_norm
        values = norm["bn_values"]
        hit = (norm["bn_training"] >= 1) & (values > 0)
        hit &= values < self.thresholds["values-per-channel"]
        if not hit.any():
            return
        for row in frame.first_rows(hit.any(1) & ~frame.outer):
            columns = np.flatnonzero(hit[row])
            layers = tuple(frame.normalization(int(c)) for c in columns)
            fewest = int(values[row, columns].min())
            yield self.at(
                frame,
                row,
                f"{frame.called(layers[:1])} normalises over {fewest} values per channel",
                f"BatchNorm over {fewest} values per channel",
                layer=layers[0],
                layers=layers,
                evidence={"values_per_channel": float(fewest)},
                fix="nn.GroupNorm(groups, channels)  # does not depend on the batch",
            )
