"""Inner steps without effect, or in the wrong direction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from divergence_probe.record.schema import Array, Flags
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.quantities import (
    collinearity,
    descent,
    known,
    whole,
)
from divergence_probe.rules.usual_loss import LITTLE, UsualLoss
from divergence_probe.thresholds import Thresholds

# Half the spacing of numbers, as a part of them: what of an update may be lost.
_SPACING = {"float32": 2.0**-24, "float64": 2.0**-53}
#: Inner optimizers whose update is rate x gradient.
_PLAIN = ("SGD", "MAML", "DifferentiableSGD", "MetaSGD")
# Of a rate, read off norms: what rounding leaves of it.
_SAME_RATE = 0.999
# Of an update: how much of it lies along the gradient where it is rate x gradient.
_STRAIGHT = 0.999
# Tasks that show by themselves that nothing moves.
_TELLING = 8
_RESOLUTION = 1e-6  # a few float32 ulps of a whole tensor's norm


class IneffectiveStep(Rule):
    """Inner steps are too small to adapt anything.

    ## What it does
    Reports a task in which every layer moved by less than a hundred-thousandth of its norm in
    every step while the gradient was not small: following it would have lowered the loss. Not where
    the same rate moves the weights of other tasks: one that has nothing to gain moves by nothing.
    An update below half the spacing of the numbers is rounded away: then not one weight moves.
    A rate of exactly 0 may be a warm-up's: that is said at the end, of a line that never moved one.

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

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._usual = UsualLoss()
        # by rank and line: the lowest rate (update over gradient) that has moved weights there
        self._rates: dict[tuple[int, float], float] = {}
        # likewise: what is to be said of the first tasks, unless a later one moves
        self._waiting: dict[tuple[int, float], list[Finding]] = {}
        # likewise: the first of the tasks with a rate of 0, and how many; None once one moved
        self._zero: dict[tuple[int, float], tuple[Finding, int] | None] = {}

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at its first step, once several tasks show that none moves."""
        self._usual.note(frame)
        before, update = known(frame, "norm_before"), known(frame, "update_norm")
        gradient = known(frame, "gradient_norm")
        moved = np.isfinite(gradient) & (gradient > 0) & ~_half(frame)
        # A bias that began at zero has no scale of its own, and any step is large beside it.
        scale = self.thresholds["small-parameter"] * whole(frame, "norm_before")[:, None]
        with np.errstate(all="ignore"):
            relative = update / np.fmax(before, scale)
            relative = np.where(moved & np.isfinite(relative), relative, -1.0)
        largest = relative.max(axis=1, initial=-1)
        tiny = (largest > 0) & (largest < self.thresholds["ineffective-update"])
        self._note_zero(frame, moved, largest)
        hit = frame.support & (tiny | (_rounded(frame, moved) & (largest == 0)))
        hit &= ~self._moves_others(frame, frame.support & (largest > 0) & ~tiny)
        self._waiting = {k: v for k, v in self._waiting.items() if k not in self._rates}
        if not hit.any():
            return
        with np.errstate(all="ignore"):
            # d loss / d ln |w|, as a part of the loss: what a change of the weights could do
            lever = np.nansum(np.where(moved, gradient * before, 0.0), axis=1)
            loss = np.fmax(np.abs(frame.block.scalars["loss"]), LITTLE)
            lever = lever / np.fmax(loss, self._usual.of(frame))
        hit &= lever > self.thresholds["effective-gradient"]
        for row in frame.first_rows(hit & ~frame.of_tasks(frame.support & ~hit)):
            key = (frame.block.rank, float(frame.block.scalars["site"][row]))
            held = self._waiting.setdefault(key, [])
            held.append(self._describe(frame, row, float(largest[row]), float(lever[row])))
            if key in self._rates or len(held) >= _TELLING:
                yield from held
                held.clear()
                self._rates.setdefault(key, math.inf)

    def finish(self) -> Iterator[Finding]:
        """There were no more tasks than these, and none of them moved."""
        for held in self._waiting.values():
            yield from held
        for entry in self._zero.values():
            if entry is not None and entry[1] >= _TELLING:
                yield replace(entry[0], count=entry[1])

    def _note_zero(self, frame: Frame, moved: Flags, largest: Array) -> None:
        """Count tasks whose steps have a gradient and a rate of 0, as long as no weight moves."""
        sites, rates = frame.block.scalars["site"], frame.block.scalars["learning_rate"]
        zero = frame.support & (largest == 0) & moved.any(1)
        zero &= frame.flagged("zero") | (rates == 0)
        for site in np.unique(sites[frame.support & (largest > 0)]).tolist():
            self._zero[frame.block.rank, site] = None
        for row in np.flatnonzero(zero & frame.begins).tolist():
            key = (frame.block.rank, float(sites[row]))
            entry = self._zero.get(key, (None, 0))
            if entry is not None:
                first = entry[0] or self._of_zero(frame, row)
                self._zero[key] = (first, entry[1] + 1)

    def _of_zero(self, frame: Frame, row: int) -> Finding:
        return self.at(
            frame,
            row,
            "no weight moves: the inner learning rate is 0 in every step",
            "the update is 0",
            evidence={"largest_relative_update": 0.0},
            fix="Check where the inner learning rate comes from (1 // 10 is 0).",
        )

    def _describe(self, frame: Frame, row: int, largest: float, lever: float) -> Finding:
        if largest == 0:
            return self._rounded_away(frame, row, lever)
        return self.at(
            frame,
            row,
            f"no layer moves by more than {largest:.1e} of its norm a step, though the gradient is "
            "not small",
            f"largest relative update {largest:.1e}",
            evidence={"largest_relative_update": largest, "lever": lever},
            fix="Raise the inner learning rate, or check that the loss is not averaged twice.",
        )

    def _moves_others(self, frame: Frame, moved: Flags) -> Flags:
        """``[S]`` steps at a rate that has ``moved`` the weights of some task at their line.

        A rate by hand is read off an update, of which rounding may have taken a part.
        """
        sites, rank = frame.block.scalars["site"], frame.block.rank
        known_rates, gradient = frame.block.scalars["learning_rate"], whole(frame, "gradient_norm")
        dtypes = [info.dtype for info in frame.block.layout.parameters]
        spacing = max(_SPACING.get(dtype, 0.0) for dtype in dtypes)
        by_hand = ~(known_rates > 0)
        with np.errstate(all="ignore"):
            lost = spacing * whole(frame, "norm_before")
            rates = np.where(by_hand, whole(frame, "update_norm") / gradient, known_rates)
            hidden = np.where(by_hand, lost / gradient, 0.0)
        for site in np.unique(sites[moved]).tolist():
            lowest = float(np.fmin.reduce(rates[moved & (sites == site)]))
            self._rates[rank, site] = min(lowest, self._rates.get((rank, site), math.inf))
        needed = np.array([self._rates.get((rank, site), math.inf) for site in sites.tolist()])
        same = rates + hidden >= _SAME_RATE * needed
        # What does not go down its gradient holds more than rate x gradient (a correction that
        # cancels it, say), and no rate is to be read off it.
        same |= by_hand & np.isfinite(needed) & (_beside(frame) > lost)
        return np.asarray(same)

    def _rounded_away(self, frame: Frame, row: int, lever: float) -> Finding:
        """Not one weight moved: which is the closest to it, and what would move it."""
        before, gradient = known(frame, "norm_before")[row], known(frame, "gradient_norm")[row]
        with np.errstate(all="ignore"):
            reach = np.where(before > 0, gradient / before, -1.0)
        column = int(np.argmax(np.nan_to_num(reach, nan=-1.0)))
        weight, slope = float(before[column]), float(gradient[column])
        dtype = frame.block.layout.parameters[column].dtype
        spacing = _SPACING.get(dtype, 2.0**-24) * weight
        rate = float(frame.block.scalars["learning_rate"][row])
        step = f"|g| {slope:.3g}"
        if math.isfinite(rate):
            step = f"rate × |g| is {rate:.3g} × {slope:.3g}"
        fix = "Raise the inner learning rate"
        if str(frame.tasks[int(frame.task[row])].data.get("optimizer") or "SGD") in _PLAIN:
            would = f"{1e-3 * weight / slope:.1g} would move {frame.parameter(column)}"
            fix = f"{fix}: {would} by 0.1 % a step"
        return self.at(
            frame,
            row,
            f"no weight moves: every update is rounded away ({frame.parameter(column)}: {step}, "
            f"and what {dtype} loses of numbers of norm {weight:.3g} is up to {spacing:.1g})",
            "the update is rounded away",
            evidence={"largest_relative_update": 0.0, "lever": lever, "lost_below": spacing},
            fix=f"{fix}.",
        )


class NegativeLearningRate(Rule):
    """A learned inner learning rate has become negative: the inner loop climbs.

    ## What it does
    Compares each update with its gradient. Where a parameter's update points up its own gradient
    (or the recorded learning rate is negative) and the support loss rises, the rate is negative.
    A remark where it may be meant: where every step at its line climbed so far (a likelihood is
    maximised, SAM looks uphill before it steps), or what climbs is no weight of a base (an input
    under attack, say). A rate is read off an update only where that goes along the gradient: what
    else is in it (control variates, a proximal term) may point up the gradient by itself.

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
        # of tensors without a name: those known to be a base, and where the last task began
        self._bases: set[tuple[int, int]] = set()
        self._starts: dict[tuple[int, int], Array] = {}
        self._descended: set[tuple[int, int, float]] = set()  # by rank, layout and line
        # layouts whose outer steps have no gradient
        self._averaged: set[tuple[int, int]] = set()

    def check(self, frame: Frame) -> Iterator[Finding]:
        """A task is reported once its loss has risen over a step with a negative rate."""
        self._note_base(frame)
        rates, layout = frame.block.parameters["step_rate"], frame.block.layout.index
        if (frame.outer & frame.flagged("incomplete")).any():
            self._averaged.add((frame.block.rank, layout))
        sites = frame.block.scalars["site"][frame.support & (rates > 0).any(1)]
        self._descended |= {(frame.block.rank, layout, site) for site in np.unique(sites).tolist()}
        negative = self._negative(frame)
        told = negative.copy()
        if self._climbing:
            told |= frame.followed(self._climbing)
        for row in np.flatnonzero(frame.support & frame.of_tasks(told)).tolist():
            key = (frame.block.rank, int(frame.task[row]))
            loss = float(frame.block.scalars["loss"][row])
            waiting = self._climbing.pop(key, None)
            if waiting is not None and loss - waiting[0] > 1e-3 * abs(waiting[0]):
                yield waiting[1]
            if negative[row]:
                self._climbing[key] = (loss, self._describe(frame, row, rates[row]))

    def _negative(self, frame: Frame) -> Flags:
        """``[S]`` steps that as a whole go up by more than a sign flip around zero could."""
        up = frame.support & (-descent(frame) > 1e-3 * np.abs(frame.block.scalars["loss"]))
        if not up.any():
            return up
        rate = frame.block.scalars["learning_rate"]
        # By hand the rate must be read off the update. What else is in it (momentum, a correction)
        # may climb, but never straight up the gradient.
        by_hand = (collinearity(frame) > _STRAIGHT) | self._may_have_a_rate_each(frame)
        by_hand &= ~frame.flagged("transformed")  # no rate is to be read off what a net made of it
        return np.asarray(up & np.where(np.isfinite(rate), rate < 0, by_hand))

    def _may_have_a_rate_each(self, frame: Frame) -> Flags:
        """``[S]`` first steps by hand that a learned rate for each weight may turn from straight.

        Such a rate has its gradient through the updates: not through those in place, nor where the
        outer step is an average of weights. (Momentum has nothing to add yet.)
        """
        if (frame.block.rank, frame.block.layout.index) in self._averaged:
            return np.zeros(len(frame.block), dtype=bool)
        facts = [frame.tasks.get(task) for task in frame.by_task.tasks]
        in_place = [fact is not None and bool(fact.data.get("in_place")) for fact in facts]
        functional = ~np.asarray(in_place, dtype=bool)[frame.by_task.of_row]
        return np.asarray(functional & (frame.step == 0))

    def _describe(self, frame: Frame, row: int, rates: Array) -> Finding:
        column = int(np.nanargmin(rates)) if np.isfinite(rates).any() else 0
        rate = float(frame.block.scalars["learning_rate"][row])
        rate = rate if math.isfinite(rate) else float(rates[column])
        learned = self._is_learned(frame, row)
        return self.at(
            frame,
            row,
            f"the inner learning rate is negative ({rate:.3g}) and the support loss rises"
            if learned
            else "the step goes up its own gradient and the support loss rises",
            f"learning rate {rate:.3g}" if learned else "climbs",
            severity=self.severity if learned else Severity.INFO,
            layer=frame.layer(column),
            evidence={"learning_rate": rate},
            fix="lr = F.softplus(raw_lr)   # a learned rate that cannot change sign"
            if learned
            else "",
        )

    def _is_learned(self, frame: Frame, row: int) -> bool:
        """Whether a rate may be one that was learned: there is a base it would be learned with.

        By hand, one that was never seen to be positive at its line, of no parameter, is an
        objective's that is maximised, or leads uphill on purpose, to where another gradient is
        taken (SAM); a learned one begins as a rate. A tensor no model owns, which begins anew in
        each task and which no outer step moves, is no weight: an input that is attacked, say, and
        to climb is what that is for.
        """
        if math.isfinite(float(frame.block.scalars["learning_rate"][row])):
            return True
        layout = (frame.block.rank, frame.block.layout.index)
        descended = (*layout, float(frame.block.scalars["site"][row])) in self._descended
        return descended and (not frame.is_nameless or layout in self._bases)

    def _note_base(self, frame: Frame) -> None:
        """Note whether outer steps move a frame's tensors, or task after task begins with them."""
        layout = (frame.block.rank, frame.block.layout.index)
        if layout in self._bases:
            return
        starts = known(frame, "norm_before")[frame.begins]
        if layout in self._starts:
            starts = np.concatenate([self._starts[layout][None], starts])
        again = (starts[1:] == starts[:-1]) & (starts[1:] > 0)
        if frame.outer.any() or again.all(1).any():
            self._bases.add(layout)
            self._starts.pop(layout, None)
        elif len(starts):
            self._starts[layout] = starts[-1].copy()


class NoParameterChange(Rule):
    """Inner steps are taken and thrown away: every step starts from the same point.

    ## What it does
    Reports inner steps whose parameters come out exactly as they went in, with a non-zero gradient
    and a learning rate that is not zero. An update that was made and is lost in the rounding of the
    weights is another matter: LR002, and FX006 in half precision.

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

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._moving: set[tuple[int, int]] = set()

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task with unchanged parameters, at the first such step."""
        thrown = frame.flagged("discarded")
        for row in frame.first_rows(self._still(frame)):
            gradient = float(whole(frame, "gradient_norm")[row])
            yield self.at(
                frame,
                row,
                f"the parameters after step {int(frame.step[row])} are exactly those before it, "
                f"with a gradient of norm {gradient:.3g}",
                "the update is thrown away" if thrown[row] else "no weight moves",
                evidence={"gradient_norm": gradient},
                fix="fast = [w - lr * g for w, g in zip(fast, grads)]   # rebind the fast weights"
                + (
                    ""
                    if thrown[row]
                    else "\n# or the rate is so small that the update is rounded away"
                ),
            )
        yield from self._repeated(frame)

    def _still(self, frame: Frame) -> Flags:
        """``[S]`` steps that moved nothing although they were large enough to be representable."""
        before, gradient = known(frame, "norm_before"), known(frame, "gradient_norm")
        # An update that was not seen (nan) says nothing, so it does not count as still.
        moved = ~np.isnan(gradient) & (known(frame, "update_norm") != 0)
        still = np.asarray(frame.support & ~moved.any(1))
        still &= ~frame.flagged("rounded", "zero") & self._steady(frame, still)
        if not still.any():
            return still
        rate = frame.block.scalars["learning_rate"]
        step = np.where(np.isfinite(rate), rate, self.thresholds["ineffective-update"])
        with np.errstate(all="ignore"):
            due = step[:, None] * gradient > _RESOLUTION * np.fmax(before, 1e-12)
        due &= ~_half(frame)
        return np.asarray(still & due.any(1))

    def _steady(self, frame: Frame, still: Flags) -> Flags:
        """``[S]`` steps that no change of a rate by hand explains: to (nearly) zero, later on.

        Where an update was made, and not seen to be zero or rounded away, only a line that never
        moved a weight is known to throw its updates away. On an accelerator an update's own numbers
        are not looked at: one of zero (a rate that warms up) is no other than one rounded away.
        """
        rate, site = frame.block.scalars["learning_rate"], frame.block.scalars["site"]
        by_hand = ~np.isfinite(rate) & ~frame.flagged("discarded")
        if any(parameter.device != "cpu" for parameter in frame.block.layout.parameters):
            return ~by_hand
        moved_before = np.zeros(len(rate), dtype=bool)
        for place in np.unique(site[frame.support]).tolist():
            key, here = (frame.block.rank, int(place)), frame.support & (site == place)
            moved_before |= here & ((key in self._moving) | np.logical_or.accumulate(here & ~still))
            if (here & ~still).any():
                self._moving.add(key)
        return np.asarray(~(by_hand & moved_before))

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


def _beside(frame: Frame) -> Array:
    """``[S]`` norm of what an update holds besides its gradient; 0 where it is next to nothing."""
    straight = collinearity(frame)
    with np.errstate(all="ignore"):
        beside = whole(frame, "update_norm") * np.sqrt(1 - straight**2)
    return np.where(straight < _STRAIGHT, beside, 0.0)


def _rounded(frame: Frame, moved: Flags) -> Flags:
    """``[S]`` steps whose update was made, was not zero, and changed no weight.

    Of steps by hand the recording says so. An optimizer's step is one unless it was large enough to
    show in one of its parameters (``moved``: ``[S, P]``), which is another fault.
    """
    rate = frame.block.scalars["learning_rate"]
    before, gradient = known(frame, "norm_before"), known(frame, "gradient_norm")
    with np.errstate(all="ignore"):
        due = moved & (rate[:, None] * gradient > _RESOLUTION * np.fmax(before, 1e-12))
    taken = np.isfinite(rate) & (rate > 0) & moved.any(1) & ~due.any(1)
    return np.asarray(frame.flagged("rounded") | taken)


def _half(frame: Frame) -> Flags:
    """``[P]`` parameters in half precision: what stands still there is rounded away (FX006)."""
    dtypes = [info.dtype for info in frame.block.layout.parameters]
    return np.asarray([dtype in ("float16", "bfloat16") for dtype in dtypes], dtype=bool)


def _mark(site: str | None, text: str) -> tuple[Mark, ...]:
    return (Mark(site, text),) if site else ()
