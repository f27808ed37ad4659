"""What one task leaves behind for the next in its optimizer: state, gradients, clipping."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import numpy as np

from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.thresholds import Thresholds

# Two directions in thousands of dimensions are this parallel only if one is made of the other.
_PARALLEL = 0.9999


class OptimizerStateCarriedOver(Rule):
    """Moments or momentum of one task enter the next task's inner loop.

    ## What it does
    Looks at the inner optimizer's state when a task begins: a step count or a moment buffer that is
    there already belongs to another task. Where the program itself put it there, with
    `load_state_dict`, or where the weights are not reset either but moved on (Reptile, Lookahead),
    this is a remark: it may be meant. So it is where outer steps follow what the inner loops came
    to, and no query (federated workers that keep their optimizers).

    ## Why it is bad
    The first steps of a task go where the task before was heading. Weights are reset between tasks,
    the optimizer is not: one half of the reset is missing.

    ## Example
    ```python
    inner = torch.optim.Adam(net.parameters())      # used for every task, and stepped before
    ```

    ## Use instead
    ```python
    for task in tasks:
        inner = torch.optim.Adam(learner.parameters())
    ```

    ## References
    facebookresearch/higher#93.
    """

    code = "OPT001"
    name = "optimizer-state-carryover"
    severity = Severity.WARNING
    cause = "optimizer-state-carryover"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._single_steps: dict[int, bool] = {}  # by rank: whether every task so far had one step
        # by rank: whether a query was asked since the last outer step; whether that used none
        self._outer_steps: dict[int, tuple[bool, bool]] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task that begins with a used optimizer."""
        yield from self._by_hand(frame)
        averaged = self._averaged(frame)
        for event in frame.events("task-start"):
            if not event.data.get("carried_state") or event.data.get("continues"):
                continue
            steps = float(event.data.get("carried_steps", 0) or 0)
            name = str(event.data.get("optimizer", "optimizer"))
            since = f" after {steps:.0f} steps" if steps else ""
            loaded = bool(event.data.get("loaded_state"))
            whence = "were loaded into it" if loaded else "come from another task"
            if event.data.get("trains_base"):
                whence = "are those of the base's own training"
            elif event.data.get("moved_on"):
                whence += ", as do the weights (moved in between, not reset)"
            meant = loaded or event.data.get("moved_on") or event.data.get("trains_base")
            meant = meant or averaged(event.seconds)
            yield self.finding(
                f"task {event.task} begins with a used {name}{since}: its moments {whence}",
                severity=Severity.INFO if meant else self.severity,
                task=event.task,
                step=0,
                phase="support",
                evidence={"steps": steps, "optimizer": name},
                marks=(Mark(event.site, f"{name} carries state into this task"),)
                if event.site
                else (),
                fix="Create the inner optimizer anew for every task.",
            )

    def _averaged(self, frame: Frame) -> Callable[[float], bool]:
        """Tells of a time whether the outer step before it used no query."""
        rank, seconds = frame.block.rank, frame.block.scalars["seconds"]
        asked, last = self._outer_steps.get(rank, (False, False))
        times, kinds = [-np.inf], [last]
        taken = frame.query & (frame.block.scalars["site"] >= 0)
        for row in np.flatnonzero(taken | frame.outer).tolist():
            if frame.outer[row]:
                times.append(float(seconds[row]))
                kinds.append(not asked)
            asked = bool(taken[row])
        self._outer_steps[rank] = asked, kinds[-1]
        return lambda time: kinds[bisect.bisect_left(times, time) - 1]

    def _by_hand(self, frame: Frame) -> Iterator[Finding]:
        """Hand-written momentum: a first step that goes on along the task before's last one.

        Where every task is a single step, momentum that begins anew would be none: it is that of
        the base's own training then, as in second-order DARTS, and a remark.
        """
        rank = frame.block.rank
        several = bool((frame.support & (frame.step > 0)).any())
        self._single_steps[rank] = self._single_steps.get(rank, True) and not several
        velocity = frame.block.scalars["carried_velocity"]
        with np.errstate(invalid="ignore"):
            hit = frame.begins & (velocity > _PARALLEL) & ~frame.flagged("transformed")
        for row in frame.first_rows(hit):
            alone = self._single_steps.get(frame.block.rank, False)
            yield self.at(
                frame,
                row,
                f"the first step of task {int(frame.task[row])} goes on along the last step of the "
                f"task before (cosine {velocity[row]:.4f} across its own gradient): its velocity "
                "is carried over",
                "this step carries another task's momentum",
                severity=Severity.INFO if alone else self.severity,
                evidence={"cosine": float(velocity[row])},
                fix="Set the velocity to zero at the start of every task.",
            )


class GradientCarriedOver(Rule):
    """A gradient from an earlier step or task is still there and is added to this one's.

    ## What it does
    Looks at ``.grad`` just before the backward of an inner step.

    ## Why it is bad
    Every step applies the sum of all gradients so far: the effective learning rate grows, and tasks
    leak into each other.

    ## Example
    ```python
    for _ in range(steps):
        loss(learner(x), y).backward()
        inner.step()
    ```

    ## Use instead
    ```python
    for _ in range(steps):
        inner.zero_grad()
        loss(learner(x), y).backward()
        inner.step()
    ```

    ## References
    learnables/learn2learn#388.
    """

    code = "OPT002"
    name = "gradient-carried-over"
    severity = Severity.ERROR
    cause = "gradient-accumulation"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._tasks: set[tuple[int, int]] = set()

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at the first step that adds to an old gradient."""
        carried = frame.block.scalars["carried_gradient"]
        adding = frame.support & (carried > 0)
        steps = frame.by_task.count(adding)
        for row in frame.first_rows(adding):
            # One leftover, from training before the first task say, is a blemish; a loop that
            # never clears meets one in every task.
            self._tasks.add((frame.block.rank, int(frame.task[row])))
            persistent = len(self._tasks) > 1 or steps[frame.by_task.of_row[row]] > 1
            yield self.at(
                frame,
                row,
                f"step {int(frame.step[row])} adds its gradient to one of norm "
                f"{carried[row]:.3g} that was already there",
                "the gradient before this step was not cleared",
                severity=self.severity if persistent else Severity.INFO,
                evidence={"carried_gradient_norm": float(carried[row])},
                fix="inner.zero_grad()   # before every backward of the inner loop",
            )


class HardClipping(Rule):
    """Gradient clipping is always active.

    ## What it does
    Counts how often a clip changed a gradient. Clipping that never lets one through sets the step
    length itself.

    ## Why it is bad
    The gradient's size no longer matters, and where the clip saturates the derivative through it is
    zero: parts of the meta-gradient vanish.

    ## Example
    ```python
    clip_grad_norm_(learner.parameters(), max_norm=0.01)
    ```

    ## Use instead
    ```python
    clip_grad_norm_(learner.parameters(), max_norm=10.0)   # for the rare spike
    ```

    ## References
    facebookresearch/higher#18, #50; Pascanu et al., On the difficulty of training recurrent
    neural networks, 2013.
    """

    code = "OPT003"
    name = "clipping-always-active"
    severity = Severity.WARNING
    cause = "hard-clipping"
    unit = "step"
    _FEWEST = 8

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._seen = {False: 0, True: 0}
        self._active = {False: 0, True: 0}
        self._taken = {False: 0, True: 0}  # (a known loop's clipping is not looked at every time)
        self._first: dict[bool, Finding] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Count; inner and outer steps apart."""
        clippable = frame.flagged("clippable", "clipped")
        active = frame.flagged("clipped")
        for outer, rows in ((False, frame.support), (True, frame.outer)):
            self._taken[outer] += int(rows.sum())
        if not clippable.any():
            return iter(())
        for outer, rows in ((False, frame.support), (True, frame.outer)):
            self._seen[outer] += int((clippable & rows).sum())
            self._active[outer] += int((active & rows).sum())
            if outer not in self._first and (active & rows).any():
                row = int(np.flatnonzero(active & rows)[0])
                self._first[outer] = self.at(frame, row, "", "clipped here")
        return iter(())

    def finish(self) -> Iterator[Finding]:
        """One finding where clipping was active nearly always."""
        for outer, first in self._first.items():
            seen, active = self._seen[outer], self._active[outer]
            if seen < self._FEWEST or active / seen < self.thresholds["clipped-share"]:
                continue
            where = "outer" if outer else "inner"
            looked = " looked at" if seen < self._taken[outer] else ""
            yield self.finding(
                f"clipping was active in {active} of {seen} {where} steps{looked}",
                task=first.task,
                step=first.step,
                phase=first.phase,
                marks=first.marks,
                count=active,
                evidence={"share": active / seen},
                fix="Raise the clipping bound until it is active only for spikes.",
            )
