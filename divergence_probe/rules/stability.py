"""Inner steps that are too long for the curvature they meet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from divergence_probe.record.schema import Flags
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.fresh_batches import FreshBatches, promised_by
from divergence_probe.rules.quantities import descent, known, median_rate, whole
from divergence_probe.thresholds import Thresholds

_OVERFLOW = math.log(3.4e38)  # largest float32


@dataclass
class _Course:
    """How one task's loss and gradient have gone so far.

    Attributes:
        loss: its latest.
        gradient: the norm of its latest.
        descent: the first-order decrease its latest step promised.
        curvature: step size x curvature of its latest overshoot.
        lowest: its lowest loss.
        before: the norm of the gradient before the first of the latest overshoots in a row.
        overshoots: how many in a row the latest are.
        by_value: whether the loss's value told one of them.
        reported: whether a finding was given.
    """

    loss: float = math.nan
    gradient: float = math.nan
    descent: float = math.nan
    curvature: float = math.nan
    lowest: float = math.inf
    before: float = math.nan
    overshoots: int = 0
    by_value: bool = False
    reported: bool = False


class StepBeyondStability(Rule):
    """Inner steps overshoot: step size x curvature is above 2 and the loss grows.

    ## What it does
    Measures the curvature along each step from two consecutive gradients. Above 2 a step climbs
    further up the far side of the valley than it came down, so the next one is larger still. It
    counts where loss and gradient grow as that predicts, twice in a row (or once by a decade), and
    says at which step the weights overflow if it goes on, and which learning rate would be stable.

    Where losses do not go as the slopes at both ends of short steps foretell, every step sees
    another batch. Two slopes may then disagree because two samples do, so it takes three overshoots
    in a row and a loss ten times the first. So it does where a net makes the updates: what one
    came to says little of how long the next will be.

    Where the valley has a kink or the far side saturates, two gradients do not show it. There the
    loss itself bounds the curvature: it cannot fall below 0, so on a quadratic a step that
    promises a decrease of d from a loss f has a curvature of at least d / 2f. Above 2, with the
    slope turned round, the loss and the gradient grown, the step went over the valley.

    ## Why it is bad
    Loss, gradients and weights grow geometrically until they overflow.

    ## Example
    ```python
    inner = torch.optim.SGD(net.parameters(), lr=1.0)     # largest stable: 0.23
    ```

    ## Use instead
    ```python
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    ```

    ## References
    Nesterov, Lectures on Convex Optimization, 2018, section 1.2.3; Cohen et al., Gradient descent
    on neural networks typically occurs at the edge of stability, 2021; Polyak, Introduction to
    Optimization, 1987, section 5.3, on the step a loss's value allows.
    """

    code = "LR001"
    name = "inner-step-beyond-stability"
    severity = Severity.WARNING
    cause = "inner-lr-too-high"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._courses: dict[tuple[int, int], _Course] = {}
        self._batches = FreshBatches()
        # lines whose loss has been negative: it is not bounded by 0 (a policy gradient, a density)
        self._unbounded: set[tuple[int, float]] = set()

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, as soon as the course is clear."""
        unbounded = self._unbounded_since(frame)
        fresh = self._fresh(frame) | frame.flagged("transformed")
        told = frame.of_tasks(self._may_overshoot(frame))
        self._pass_over(frame, frame.seen & frame.unfinished & ~told)
        gradients, descents = whole(frame, "gradient_norm"), descent(frame)
        for row in np.flatnonzero(frame.seen & told).tolist():
            key = (frame.block.rank, int(frame.task[row]))
            course = self._courses.setdefault(key, _Course())
            loss = float(frame.block.scalars["loss"][row])
            line = (frame.block.rank, float(frame.block.scalars["site"][row]))
            bounded = row < unbounded.get(line, len(frame.block))
            if self._overshoots(frame, row, course, float(gradients[row]), bounded):
                if not course.overshoots:
                    course.before = course.gradient
                course.overshoots += 1
            else:
                course.overshoots, course.by_value = 0, False
            grown = float(gradients[row]) >= 2 * course.before
            first = float(frame.first_loss[row])
            if not course.reported and self._is_clear(course, loss, first, grown, bool(fresh[row])):
                course.reported = True
                yield self._describe(frame, row, course)
            course.loss, course.gradient = loss, float(gradients[row])
            course.descent = float(descents[row])
            course.lowest = min(course.lowest, loss) if math.isfinite(loss) else course.lowest
        for task in frame.block.ended:
            self._courses.pop((frame.block.rank, task), None)

    def _fresh(self, frame: Frame) -> Flags:
        """``[S]`` whether a row's line is known to see another batch at every step."""
        losses, promised = promised_by(frame)
        for row in np.flatnonzero(frame.seen & np.isnan(losses) & (frame.step > 0)).tolist():
            course = self._courses.get((frame.block.rank, int(frame.task[row])))
            if course is not None:  # it began in an earlier block
                losses[row], promised[row] = course.loss, course.descent
        return np.asarray(self._batches.note(frame, losses, promised), dtype=bool)

    def _unbounded_since(self, frame: Frame) -> dict[tuple[int, float], int]:
        """By line, the first row from which on its loss is known to go below 0."""
        since = dict.fromkeys(self._unbounded, -1)
        negative = np.flatnonzero(frame.seen & (frame.block.scalars["loss"] < 0))
        if len(negative):
            sites, first = np.unique(frame.block.scalars["site"][negative], return_index=True)
            for site, row in zip(sites.tolist(), negative[first].tolist(), strict=True):
                since.setdefault((frame.block.rank, site), row)
            self._unbounded.update(since)
        return since

    def _may_overshoot(self, frame: Frame) -> Flags:
        """``[S]`` steps whose loss rose after one that was long for its curvature."""
        losses, before = frame.block.scalars["loss"], frame.by_task.previous(frame.seen)
        long = frame.block.scalars["instability"] > min(1.0, self.thresholds["instability"])
        return np.asarray(frame.seen & long & ((before < 0) | (losses > losses[before])))

    def _pass_over(self, frame: Frame, chosen: Flags) -> None:
        """Note how tasks go on that do not overshoot in their ``chosen`` (``[S]``) rows."""
        if not chosen.any():
            return
        gradients, descents = whole(frame, "gradient_norm"), descent(frame)
        losses = frame.block.scalars["loss"]
        lowest = np.where(frame.seen & np.isfinite(losses), losses, np.inf)
        last = frame.by_task.last(chosen)
        for position in np.flatnonzero(last >= 0).tolist():
            row, index = int(last[position]), frame.by_task.tasks[position]
            course = self._courses.setdefault((frame.block.rank, index), _Course())
            course.overshoots, course.by_value = 0, False
            course.loss, course.gradient = float(losses[row]), float(gradients[row])
            course.descent = float(descents[row])
            here = float(lowest[frame.by_task.rows(position)].min())
            course.lowest = min(course.lowest, here)

    def _overshoots(
        self, frame: Frame, row: int, course: _Course, gradient: float, bounded: bool
    ) -> bool:
        """Whether the step before this row overshot, and the loss rose as its curvature says."""
        product = float(frame.block.scalars["instability"][row])
        loss = float(frame.block.scalars["loss"][row])
        if not loss > course.loss:
            return False
        if bounded and product > 1 and loss > float(frame.first_loss[row]):
            # The slope turned round over the step, which was too long for a loss of this size.
            least = course.descent / (2 * max(course.loss, 1e-30))
            if least > self.thresholds["instability"] and gradient > course.gradient:
                # (The bound is that of a lowest loss of 0: two gradients may show more.)
                course.curvature = max(least, product) if math.isfinite(product) else least
                course.by_value = True
                return True
        if not product > self.thresholds["instability"]:
            return False
        course.curvature = product
        if not math.isfinite(product) or not math.isfinite(loss):
            return course.overshoots > 0
        predicted = course.descent * (product / 2 - 1)
        # Along a convex loss it rises by no more than the slope where the step ends times the step;
        # more is not the step's doing, but another batch's (twice, for losses that are not convex).
        most = 2 * course.descent * (product - 1)
        return gradient > course.gradient and 0.1 * predicted < loss - course.loss < most

    def _is_clear(
        self, course: _Course, loss: float, first: float, grown: bool, fresh: bool
    ) -> bool:
        """Whether the growth cannot be noise: twice in a row, or a decade at once.

        Where the loss's value is what tells, loss and gradient must have doubled: a bounded loss
        (of frequencies, say) is thrown about by steps that are long, and nothing grows. Where every
        step sees another batch (``fresh``), two slopes that disagree may be those of two samples
        (or of two updates that a net made): then it takes three in a row, and a decade.
        """
        if not course.overshoots or not math.isfinite(first):
            return False
        floor = max(course.lowest, 1e-3 * abs(first), 1e-12)
        if fresh:
            return course.overshoots >= 3 and loss >= 10 * max(floor, abs(first))
        if loss >= 10 * max(floor, abs(first), course.loss):
            return True
        if course.by_value and not (grown and loss > 2 * abs(first)):
            return False
        return course.overshoots >= 2 and loss > 2 * floor and loss > 0.5 * abs(first)

    def _describe(self, frame: Frame, row: int, course: _Course) -> Finding:
        product = course.curvature
        rate = float(frame.block.scalars["learning_rate"][row])
        if not math.isfinite(rate):
            rate = median_rate(frame, row)
        stable = self.thresholds["instability"] / product * rate
        here = float(whole(frame, "gradient_norm")[row])
        # Along a quadratic the gradient grows by |product - 1| a step; off it, by what it did.
        factor = max(abs(product - 1), here / max(course.gradient, 1e-30))
        norm = float(whole(frame, "norm_after")[row])
        ahead = math.ceil((_OVERFLOW - math.log(max(norm, 1e-30))) / math.log(max(factor, 1.01)))
        step = int(frame.step[row])
        advice = f"lr = {stable:.2g}  # or less: the largest stable step here" if stable > 0 else ""
        if frame.flagged("transformed")[row]:
            advice = ""  # no rate of the user's makes that step
        updates = known(frame, "update_norm")[row]
        layer = frame.layer(int(np.nanargmax(updates))) if np.isfinite(updates).any() else None
        return self.at(
            frame,
            row,
            f"step size × curvature is {product:.3g} (above 2 steps grow): the loss rose from "
            f"{course.loss:.4g} to {float(frame.block.scalars['loss'][row]):.4g} at step {step}; "
            f"at this rate the weights overflow by step {step + ahead}",
            f"step size × curvature {product:.3g}, stable below 2",
            layer=layer,
            evidence={
                "step_size_x_curvature": product,
                "largest_stable_learning_rate": stable,
                "learning_rate": rate,
                "overflow_at_step": float(step + ahead),
            },
            fix=advice,
        )
