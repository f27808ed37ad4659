"""What one task leaves behind for the next: optimizer state, gradients, weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from divergence_probe.record.schema import FLAGS, Array, Flags
from divergence_probe.rules.base import Frame, Rule, missing_to_nan
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.thresholds import Thresholds

# Two directions in thousands of dimensions are this parallel only if one is made of the other.
_PARALLEL = 0.9999


class OptimizerStateCarriedOver(Rule):
    """Moments or momentum of one task enter the next task's inner loop.

    ## What it does
    Looks at the inner optimizer's state when a task begins: a step count or a moment buffer that is
    there already belongs to another task. Where the program itself put it there, with
    `load_state_dict`, this is a remark: Reptile is often written so.

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

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task that begins with a used optimizer."""
        yield from self._by_hand(frame)
        for event in frame.events("task-start"):
            if not event.data.get("carried_state") or event.data.get("continues"):
                continue
            steps = float(event.data.get("carried_steps", 0) or 0)
            name = str(event.data.get("optimizer", "optimizer"))
            since = f" after {steps:.0f} steps" if steps else ""
            loaded = bool(event.data.get("loaded_state"))
            whence = "were loaded into it" if loaded else "come from another task"
            yield self.finding(
                f"task {event.task} begins with a used {name}{since}: its moments {whence}",
                severity=Severity.INFO if loaded else self.severity,
                task=event.task,
                step=0,
                phase="support",
                evidence={"steps": steps, "optimizer": name},
                marks=(Mark(event.site, f"{name} carries state into this task"),)
                if event.site
                else (),
                fix="Create the inner optimizer anew for every task.",
            )

    def _by_hand(self, frame: Frame) -> Iterator[Finding]:
        """Hand-written momentum: a first step that goes on along the task before's last one."""
        velocity = frame.block.scalars["carried_velocity"]
        with np.errstate(invalid="ignore"):
            hit = frame.support & (frame.step == 0) & (velocity > _PARALLEL)
        for row in frame.first_rows(hit):
            yield self.at(
                frame,
                row,
                f"the first step of task {int(frame.task[row])} goes on along the last step of the "
                f"task before (cosine {velocity[row]:.4f} across its own gradient): its velocity "
                "is carried over",
                "this step carries another task's momentum",
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
        for row in frame.first_rows(frame.support & (carried > 0)):
            # One leftover, from training before the first task say, is a blemish; a loop that
            # never clears meets one in every task.
            self._tasks.add((frame.block.rank, int(frame.task[row])))
            steps = frame.support & (carried > 0) & (frame.task == frame.task[row])
            persistent = len(self._tasks) > 1 or int(steps.sum()) > 1
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
        self._first: dict[bool, Finding] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Count; inner and outer steps apart."""
        flags = frame.block.scalars["flags"].astype(int)
        clippable = (flags & (FLAGS["clippable"] | FLAGS["clipped"])) > 0
        active = (flags & FLAGS["clipped"]) > 0
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
            yield self.finding(
                f"clipping was active in {active} of {seen} {where} steps",
                task=first.task,
                step=first.step,
                phase=first.phase,
                marks=first.marks,
                count=active,
                evidence={"share": active / seen},
                fix="Raise the clipping bound until it is active only for spikes.",
            )


class BaseMutated(Rule):
    """The inner loop changed the base model for the tasks after it.

    ## What it does
    Compares the weights each task starts from with those the task before started from. Where they
    differ and no outer step came between, the inner loop itself moved the base. Steps that make new
    tensors, or write into copies, can only have done so where a task begins with what the one
    before left; other weights then are another model's, or were moved by hand.

    ## Why it is bad
    Tasks are no longer independent: each starts where the last one ended, at least in part.
    It is what Reptile and continual adaptation mean to do; then it is a remark, and
    ``--intent reptile`` or ``--intent continual`` silences it.

    ## Example
    ```python
    fast = list(net.parameters())
    for w, g in zip(fast, grads):
        w.data -= lr * g               # writes into the base model
    ```

    ## Use instead
    ```python
    fast = [w - lr * g for w, g in zip(fast, grads)]
    ```

    ## References
    Nichol et al., On first-order meta-learning algorithms, 2018, for the case where it is meant.
    """

    code = "BASE001"
    name = "base-model-mutated"
    severity = Severity.WARNING
    cause = "base-mutated"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._before: dict[tuple[int, int], tuple[int, Array, Array]] = {}
        self._instances: dict[tuple[int, int], object] = {}
        self._stepped: dict[object, int] = {}
        self._pending: list[Finding] = []
        self._outer_steps = 0
        self._without_effect = 0

    def check(self, frame: Frame) -> Iterator[Finding]:
        """Compare each task's first row with the task before it, in order of time."""
        for event in frame.events("restore-without-effect"):
            # Once may be the first restore, of a state saved just before it.
            self._without_effect += 1
            if self._without_effect < 2:
                continue
            yield self.finding(
                "load_state_dict puts back the very weights the task ended with: the state was "
                "kept by reference, so nothing is restored",
                marks=(Mark(event.site, "restores nothing"),) if event.site else (),
                fix="saved = copy.deepcopy(net.state_dict())   # state_dict() alone does not copy",
            )
        before = missing_to_nan(frame.block.parameters["norm_before"])
        after = missing_to_nan(frame.block.parameters["norm_after"])
        layout = (frame.block.rank, frame.block.layout.index)
        outer, support, step = frame.outer.tolist(), frame.support.tolist(), frame.step.tolist()
        for row in range(len(frame.block)):
            if outer[row]:
                self._outer_steps += 1
                previous = self._before.pop(layout, None)
                # A copy that lists its parameters otherwise has another layout: the outer step
                # is between its tasks all the same.
                self._before = {k: v for k, v in self._before.items() if k[0] != layout[0]}
                if previous is not None:
                    yield from self._stepped_from(frame, row, before[row], *previous[1:])
            elif support[row]:
                if step[row] == 0:
                    yield from self._begin(frame, row, layout, before[row])
                known = self._before.get(layout)
                if known is not None and known[0] == int(frame.task[row]):
                    self._before[layout] = (known[0], known[1], after[row])

    def _begin(
        self, frame: Frame, row: int, layout: tuple[int, int], start: Array
    ) -> Iterator[Finding]:
        previous = self._before.get(layout)
        task = int(frame.task[row])
        self._before[layout] = (task, start, start)
        facts = frame.tasks.get(task)
        instance = facts.data.get("instance") if facts is not None else None
        other = self._instances.get(layout, instance) != instance
        self._instances[layout] = instance
        if previous is None or previous[0] == task or other:
            return  # (another model of the same structure begins where it likes)
        _, earlier, ended = previous
        if len(earlier) != len(start):
            return
        known = np.isfinite(earlier) & np.isfinite(start) & np.isfinite(ended)
        moved = known & ~_alike(start, earlier)
        if not moved.any():
            return
        kept = known & _alike(start, ended)
        adapted = known & ~_alike(ended, earlier)
        if facts is not None and _spares_the_base(facts.data) and not (kept & adapted).any():
            return
        yield self._describe(frame, row, moved, kept, adapted)

    def _stepped_from(
        self, frame: Frame, row: int, here: Array, start: Array, ended: Array
    ) -> Iterator[Finding]:
        """An outer step that starts from what the inner loop wrote, not from where it began."""
        if len(here) != len(start):
            return
        known = np.isfinite(here) & np.isfinite(start) & np.isfinite(ended)
        moved = known & ~_alike(here, start)
        if not moved.any() or not (moved & np.isclose(here, ended, rtol=1e-6)).any():
            return
        layers = tuple(dict.fromkeys(frame.layer(int(c)) for c in np.flatnonzero(moved)))
        yield self.at(
            frame,
            row,
            f"the outer step starts from the weights the inner loop left in the base "
            f"({frame.called(layers)})",
            "the base was changed before this outer step",
            layer=layers[0],
            layers=layers,
            fix="Adapt a copy: fast = [w - lr * g ...] without .data and without in-place writes.",
        )

    def _describe(
        self, frame: Frame, row: int, moved: Flags, kept: Flags, adapted: Flags
    ) -> Finding:
        columns = np.flatnonzero(moved)
        layers = tuple(dict.fromkeys(frame.layer(int(c)) for c in columns))
        carried = bool((kept & adapted).any())
        restored = bool((adapted & ~moved).any())
        half = carried and restored
        # Everything carried over, or moved elsewhere, may be meant (continual, Reptile); a reset
        # of some weights only is not, nor is a base that an outer step is to move as well.
        meant = not half and not (carried and self._outer_steps)
        how = "only partly restored" if half else "not where the task before began"
        return self.at(
            frame,
            row,
            f"task {int(frame.task[row])} begins with weights {how} ({frame.called(layers)}), with "
            "no outer step between",
            "the task begins with weights another task left",
            severity=Severity.INFO if meant else Severity.WARNING,
            layer=layers[0],
            layers=layers,
            evidence={"parameters_moved": float(moved.sum())},
            fix="Adapt a copy: copy.deepcopy(net), or fast = [w - lr * g ...] without writing into "
            "the base.",
        )


def _spares_the_base(data: Mapping[str, object]) -> bool:
    """Whether a task's steps are seen to write into none of the tensors it began from."""
    if "adapter" not in data:
        return False
    own = data.get("in_place") and not data.get("copied")
    return not data.get("writes_base", own)


def _alike(left: Array, right: Array) -> Flags:
    """Equal norms but for rounding, as ``np.isclose`` without what that costs on a few numbers."""
    with np.errstate(all="ignore"):
        return np.asarray(np.abs(left - right) <= 1e-6 * np.abs(right))
