"""Inner steps of the wrong size: beyond stability, without effect, or in the wrong direction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from divergence_probe.record.schema import Array, Flags
from divergence_probe.rules.base import Frame, Rule, missing_to_nan
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.quantities import collinearity, descent, median_rate, whole_norm
from divergence_probe.thresholds import Thresholds

_OVERFLOW = math.log(3.4e38)  # largest float32
_RESOLUTION = 1e-6  # a few float32 ulps of a whole tensor's norm


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
        # lines whose loss has been negative: it is not bounded by 0 (a policy gradient, a density)
        self._unbounded: set[tuple[int, float]] = set()

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, as soon as the course is clear."""
        gradients = whole_norm(frame.block.parameters["gradient_norm"])
        descents = descent(frame)
        for row in map(int, np.flatnonzero(frame.support & (frame.block.scalars["loss_seen"] > 0))):
            key = (frame.block.rank, int(frame.task[row]))
            course = self._courses.setdefault(key, _Course())
            loss = float(frame.block.scalars["loss"][row])
            line = (frame.block.rank, float(frame.block.scalars["site"][row]))
            if loss < 0:
                self._unbounded.add(line)
            bounded = line not in self._unbounded
            if self._overshoots(frame, row, course, float(gradients[row]), bounded):
                if not course.overshoots:
                    course.before = course.gradient
                course.overshoots += 1
            else:
                course.overshoots, course.by_value = 0, False
            grown = float(gradients[row]) >= 2 * course.before
            first = float(frame.first_loss[row])
            if not course.reported and self._is_clear(course, loss, first, grown):
                course.reported = True
                yield self._describe(frame, row, course)
            course.loss, course.gradient = loss, float(gradients[row])
            course.descent = float(descents[row])
            course.lowest = min(course.lowest, loss) if math.isfinite(loss) else course.lowest
        for event in frame.events("task-end"):
            self._courses.pop((frame.block.rank, event.task), None)

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
            course.curvature = course.descent / (2 * max(course.loss, 1e-30))
            if course.curvature > self.thresholds["instability"] and gradient > course.gradient:
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

    def _is_clear(self, course: _Course, loss: float, first: float, grown: bool) -> bool:
        """Whether the growth cannot be noise: twice in a row, or a decade at once.

        Where the loss's value is what tells, loss and gradient must have doubled: a bounded loss
        (of frequencies, say) is thrown about by steps that are long, and nothing grows.
        """
        if not course.overshoots or not math.isfinite(first):
            return False
        floor = max(course.lowest, 1e-3 * abs(first), 1e-12)
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
        here = float(whole_norm(frame.block.parameters["gradient_norm"])[row])
        # Along a quadratic the gradient grows by |product - 1| a step; off it, by what it did.
        factor = max(abs(product - 1), here / max(course.gradient, 1e-30))
        norm = float(whole_norm(frame.block.parameters["norm_after"])[row])
        ahead = math.ceil((_OVERFLOW - math.log(max(norm, 1e-30))) / math.log(max(factor, 1.01)))
        step = int(frame.step[row])
        advice = f"lr = {stable:.2g}  # or less: the largest stable step here" if stable > 0 else ""
        updates = missing_to_nan(frame.block.parameters["update_norm"][row])
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


class IneffectiveStep(Rule):
    """Inner steps are too small to adapt anything.

    ## What it does
    Reports a task in which every layer moved by less than a hundred-thousandth of its norm in
    every step while the gradient was not small: following it would have lowered the loss.

    ## Why it is bad
    The query is answered by the base model; there is no inner loop in effect.

    ## Example
    ```python
    loss = F.cross_entropy(net(x), y) / len(x)     # the mean is taken twice
    ```

    ## Use instead
    ```python
    loss = F.cross_entropy(net(x), y)
    ```

    ## References
    learnables/learn2learn#190.
    """

    code = "LR002"
    name = "ineffective-inner-step"
    severity = Severity.WARNING
    cause = "ineffective-inner-step"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at its first step."""
        before = missing_to_nan(frame.block.parameters["norm_before"])
        update = missing_to_nan(frame.block.parameters["update_norm"])
        gradient = missing_to_nan(frame.block.parameters["gradient_norm"])
        moved = np.isfinite(gradient) & (gradient > 0) & ~_half(frame)
        # A bias that began at zero has no scale of its own, and any step is large beside it.
        scale = self.thresholds["small-parameter"] * whole_norm(before)[:, None]
        with np.errstate(all="ignore"):
            relative = np.where(moved, update / np.fmax(before, scale), np.nan)
            largest = np.nanmax(np.where(np.isfinite(relative), relative, -1.0), axis=1, initial=-1)
            # d loss / d ln |w|, as a part of the loss: what a change of the weights could do
            lever = np.nansum(np.where(moved, gradient * before, 0.0), axis=1)
            lever = lever / np.abs(frame.block.scalars["loss"])
        bound = self.thresholds["ineffective-update"]
        hit = frame.support & (largest > 0) & (largest < bound)
        hit &= lever > self.thresholds["effective-gradient"]
        tasks = {int(t) for t in np.unique(frame.task[frame.support & ~hit])}
        for row in frame.first_rows(hit):
            if int(frame.task[row]) in tasks:
                continue
            yield self.at(
                frame,
                row,
                f"no layer moves by more than {largest[row]:.1e} of its norm a step, though the "
                "gradient is not small",
                f"largest relative update {largest[row]:.1e}",
                evidence={
                    "largest_relative_update": float(largest[row]),
                    "lever": float(lever[row]),
                },
                fix="Raise the inner learning rate, or check that the loss is not averaged twice.",
            )


class NegativeLearningRate(Rule):
    """A learned inner learning rate has become negative: the inner loop climbs.

    ## What it does
    Compares each update with its gradient. Where a parameter's update points up its own gradient
    (or the recorded learning rate is negative) and the support loss rises, the rate is negative.

    ## Why it is bad
    The inner loop un-learns the support set. The outer loss may still fall for a while, by using
    the inner loop as a perturbation.

    ## Example
    ```python
    fast = [w - lr * g for w, g in zip(fast, grads)]      # lr is a parameter of the outer loop
    ```

    ## Use instead
    ```python
    fast = [w - F.softplus(raw_lr) * g for w, g in zip(fast, grads)]
    ```

    ## References
    Li et al., Meta-SGD, 2017, learns signed rates on purpose; Antoniou et al., How to train your
    MAML, 2019, section 4.
    """

    code = "LR003"
    name = "negative-inner-learning-rate"
    severity = Severity.WARNING
    cause = "negative-learned-lr"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._climbing: dict[tuple[int, int], tuple[float, Finding]] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """A task is reported once its loss has risen over a step with a negative rate."""
        rates = frame.block.parameters["step_rate"]
        gradients = missing_to_nan(frame.block.parameters["gradient_norm"])
        with np.errstate(all="ignore"):
            climb = np.nansum(rates * gradients**2, axis=1)  # minus the first-order loss change
        for row in np.flatnonzero(frame.support):
            key = (frame.block.rank, int(frame.task[row]))
            loss = float(frame.block.scalars["loss"][row])
            waiting = self._climbing.pop(key, None)
            if waiting is not None and loss - waiting[0] > 1e-3 * abs(waiting[0]):
                yield waiting[1]
            if self._is_negative(frame, int(row), float(climb[row]), loss):
                self._climbing[key] = (loss, self._describe(frame, int(row), rates[row]))

    def _is_negative(self, frame: Frame, row: int, climb: float, loss: float) -> bool:
        """Whether the step as a whole goes up by more than a sign flip around zero could."""
        if not -climb > 1e-3 * abs(loss):
            return False
        rate = float(frame.block.scalars["learning_rate"][row])
        if math.isfinite(rate):
            return rate < 0
        # By hand the rate must be read off the update. Momentum also climbs at times, but never
        # straight up the gradient, and never in a task's first step.
        return frame.step[row] == 0 or bool(collinearity(frame)[row] > 0.999)

    def _describe(self, frame: Frame, row: int, rates: Array) -> Finding:
        column = int(np.nanargmin(rates)) if np.isfinite(rates).any() else 0
        rate = float(frame.block.scalars["learning_rate"][row])
        rate = rate if math.isfinite(rate) else float(rates[column])
        return self.at(
            frame,
            row,
            f"the inner learning rate is negative ({rate:.3g}) and the support loss rises",
            f"learning rate {rate:.3g}",
            layer=frame.layer(column),
            evidence={"learning_rate": rate},
            fix="lr = F.softplus(raw_lr)   # a learned rate that cannot change sign",
        )


class NoParameterChange(Rule):
    """Inner steps are taken and thrown away: every step starts from the same point.

    ## What it does
    Reports inner steps whose parameters come out exactly as they went in, with a non-zero gradient
    and a learning rate that is not declared zero.

    ## Why it is bad
    The loop does not adapt. The losses of its steps are exactly equal.

    ## Example
    ```python
    for w, g in zip(fast, grads):
        w = w - lr * g                 # rebinds the loop variable, not the list
    ```

    ## Use instead
    ```python
    fast = [w - lr * g for w, g in zip(fast, grads)]
    ```

    ## References
    The Python tutorial, section 4.2, on changing a collection while iterating over it.
    """

    code = "LR004"
    name = "no-parameter-change"
    severity = Severity.ERROR
    cause = "no-parameter-change"

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task with unchanged parameters, at the first such step."""
        update = missing_to_nan(frame.block.parameters["update_norm"])
        gradient = missing_to_nan(frame.block.parameters["gradient_norm"])
        hit = frame.support & self._still(frame, update, gradient)
        for row in frame.first_rows(hit):
            yield self.at(
                frame,
                row,
                f"the parameters after step {int(frame.step[row])} are exactly those before it, "
                f"with a gradient of norm {float(whole_norm(gradient)[row]):.3g}",
                "the update is thrown away",
                evidence={"gradient_norm": float(whole_norm(gradient)[row])},
                fix="fast = [w - lr * g for w, g in zip(fast, grads)]   # rebind the fast weights",
            )
        yield from self._repeated(frame)

    def _still(self, frame: Frame, update: Array, gradient: Array) -> Flags:
        """``[S]`` whether nothing moved although the step was large enough to be representable."""
        before = missing_to_nan(frame.block.parameters["norm_before"])
        rate = frame.block.scalars["learning_rate"]
        step = np.where(np.isfinite(rate), rate, self.thresholds["ineffective-update"])
        with np.errstate(all="ignore"):
            due = step[:, None] * gradient > _RESOLUTION * np.fmax(before, 1e-12)
        due &= ~_half(frame)
        # An update that was not seen (nan) says nothing, so it does not count as still.
        moved = ~np.isnan(gradient) & (update != 0)
        return np.asarray(due.any(1) & ~moved.any(1))

    def _repeated(self, frame: Frame) -> Iterator[Finding]:
        for event in frame.events("repeated-gradient"):
            yield self.finding(
                f"the same gradient was taken {event.data.get('times')} times and no update "
                "of the parameters it was taken of followed",
                task=event.task if event.task >= 0 else None,
                marks=_mark(event.site, "gradient of parameters that never change"),
                evidence={"times": float(event.data.get("times", 0))},
                fix="Give the optimizer the parameters the loss is computed with.",
            )


def _half(frame: Frame) -> Flags:
    """``[P]`` parameters in half precision: what stands still there is rounded away (FX006)."""
    dtypes = [info.dtype for info in frame.block.layout.parameters]
    return np.asarray([dtype in ("float16", "bfloat16") for dtype in dtypes], dtype=bool)


def _mark(site: str | None, text: str) -> tuple[Mark, ...]:
    return (Mark(site, text),) if site else ()
