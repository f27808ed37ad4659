"""Inner loops whose first step leaps over the valley, and that never come back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.quantities import descent, median_rate
from divergence_probe.thresholds import Thresholds

# A task tells once it has taken this many steps, and the loop once this many tasks have told.
_STEPS, _TASKS = 4, 3
_WORSE = 2.0  # times the loss before the first step
_Line = tuple[int, float]


@dataclass
class _Course:
    """One task since its first step.

    Attributes:
        line: rank and number of the line of its steps.
        first: its loss before the first step.
        least: the least step size x curvature that this step can have had.
        rate: its learning rate.
        said: a finding at that step, to be given its numbers.
        worse: whether every loss since was far above the first.
        last: the latest loss.
        steps: losses seen.
    """

    line: _Line
    first: float
    least: float
    rate: float
    said: Finding
    worse: bool = True
    last: float = math.nan
    steps: int = 1


@dataclass
class _Loop:
    """What the tasks of one line have shown: findings held, and whether they may be said."""

    held: list[Finding] = field(default_factory=list)
    told: int = 0
    cleared: bool = False


class OnlyWorse(Rule):
    """The inner loop makes every task's support loss worse, from a first step that is too long.

    ## What it does
    A loss that cannot fall below 0 bounds its own curvature: on a quadratic, a step that promises a
    decrease of d from a loss f has a step size x curvature of at least d / 2f. Reports tasks whose
    first step is above 2 by that, and whose loss is more than twice the first at every step
    after it, where so it is in all tasks of the loop, three at least.

    LR001 sees steps that grow. Where the far side saturates (the linear tails of cross-entropy)
    and momentum carries the weights along it, gradients shrink and nothing grows.

    ## Why it is bad
    Adapted weights are worse than those the task began with: the outer loop learns to undo them.

    ## Example
    ```python
    inner = torch.optim.SGD(net.parameters(), lr=5.0, momentum=0.9)
    ```

    ## Use instead
    ```python
    inner = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    ```

    ## References
    Polyak, Introduction to Optimization, 1987, section 5.3, on the step a loss's value allows.
    """

    code = "LR005"
    name = "adaptation-only-worsens"
    severity = Severity.WARNING
    cause = "inner-lr-too-high"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._courses: dict[tuple[int, int], _Course] = {}
        self._loops: defaultdict[_Line, _Loop] = defaultdict(_Loop)

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, once enough tasks are of this kind and none is not."""
        self._clear_others(frame)
        self._begin(frame)
        if not self._courses:
            return
        losses, rank = frame.block.scalars["loss"], frame.block.rank
        rows = frame.seen & frame.followed(self._courses) & (frame.step > 0)
        for row in np.flatnonzero(rows).tolist():
            course = self._courses[rank, int(frame.task[row])]
            course.last, course.steps = float(losses[row]), course.steps + 1
            course.worse &= not course.last <= _WORSE * course.first  # (a NaN is no better)
        for task in frame.block.ended:
            course_over = self._courses.pop((rank, task), None)
            if course_over is not None:
                yield from self._end(course_over)

    def _clear_others(self, frame: Frame) -> None:
        """Lines where a loss is below 0, which bounds nothing, or a net makes the updates."""
        losses, sites = frame.block.scalars["loss"], frame.block.scalars["site"]
        other = frame.seen & ((losses < 0) | frame.flagged("transformed"))
        for site in np.unique(sites[other]).tolist():
            self._loops[frame.block.rank, site].cleared = True

    def _begin(self, frame: Frame) -> None:
        """Follow tasks whose first step is too long; one whose step is not clears its line."""
        losses, sites = frame.block.scalars["loss"], frame.block.scalars["site"]
        begins = np.flatnonzero(frame.begins & frame.seen & (losses > 0))
        if not len(begins):
            return
        with np.errstate(all="ignore"):
            least = descent(frame)[begins] / (2 * losses[begins])
        for row, bound in zip(begins.tolist(), least.tolist(), strict=True):
            line = (frame.block.rank, float(sites[row]))
            if self._loops[line].cleared:
                continue
            if not bound > self.thresholds["instability"]:
                self._loops[line].cleared = True
                continue
            rate = float(frame.block.scalars["learning_rate"][row])
            self._courses[frame.block.rank, int(frame.task[row])] = _Course(
                line,
                float(losses[row]),
                bound,
                rate if rate > 0 else median_rate(frame, row),
                self.at(frame, row, "", f"the first step: step size × curvature {bound:.3g}"),
            )

    def _end(self, course: _Course) -> Iterator[Finding]:
        loop = self._loops[course.line]
        if loop.cleared or course.steps < _STEPS:
            return
        if not course.worse:
            loop.cleared = True
            return
        loop.told += 1
        loop.held.append(self._describe(course))
        if loop.told >= _TASKS:
            yield from loop.held
            loop.held.clear()

    def _describe(self, course: _Course) -> Finding:
        stable = self.thresholds["instability"] / course.least * course.rate
        return replace(
            course.said,
            message=f"the first step is too long for the loss it is taken of (step size × "
            f"curvature {course.least:.3g} or more, above 2 a step overshoots), and every loss "
            f"after it is worse: {course.first:.4g}, and {course.last:.4g} after "
            f"{course.steps - 1} steps",
            evidence={
                "step_size_x_curvature": course.least,
                "learning_rate": course.rate,
                "first_loss": course.first,
                "last_loss": course.last,
            },
            fix=f"lr = {stable:.2g}  # or less: what a loss of this size allows",
        )
