"""Norms and losses that grow without bound while every number is still finite."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from divergence_probe.record.schema import Array, Flags
from divergence_probe.rules.base import Frame, Rule
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.quantities import whole
from divergence_probe.rules.usual_loss import LITTLE, UsualLoss
from divergence_probe.thresholds import Thresholds

_DECADE = 10.0
# Weights smaller than they are made anywhere (root mean square) have no scale of their own.
_NEXT_TO_NOTHING = 1e-2


class NormExplosion(Rule):
    """A parameter's norm grew by decades within one task.

    ## What it does
    Compares each parameter's norm after every inner step with its norm when the task began.
    Parameters smaller than most (zero-initialised heads, biases) have no scale of their own: they
    are measured against the median of all. A decade counts where the loss does not get below the
    task's first (nor above it, where steps go up its gradient); three decades count always, of
    weights that begin next to nothing (below 0.01, root mean square) and end where they are meant
    to, from there on. None counts where every step lowers the loss and is shorter than the one
    before: the task ends where it goes (to targets of another scale, say). A task's only step from
    weights next to nothing to weights below 1 counts where the query's loss is a decade above the
    first.

    ## Why it is bad
    An inner loop is meant to adapt weights, not to replace them: healthy tasks move a trained
    weight by percents. From here the next steps overflow.

    ## Example
    ```python
    net.eval()                                   # BatchNorm with untrained statistics
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        diffopt.step(loss)                       # 9.59 -> 1.7e5 in five steps
    ```

    ## Use instead
    Remove the cause the report names; a smaller learning rate only delays a wrong mode.

    ## References
    arXiv:1706.05350 on why scale-invariant weights before BatchNorm may grow while all is well.
    """

    code = "NG001"
    name = "norm-explosion"
    severity = Severity.ERROR

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at the first step that passed the bound."""
        bounds = self.thresholds["norm-growth"], self.thresholds["norm-growth-any-loss"]
        if not (frame.growth >= min(bounds)).any():
            return
        growth = np.where(frame.support[:, None], frame.growth, np.nan)
        grown = np.asarray((growth >= min(bounds)).any(1))
        with np.errstate(invalid="ignore"):
            falling = _lowest_from_here(frame, grown) < frame.first_loss
            rising = -_lowest_from_here(frame, grown, -1.0) > frame.first_loss
            meant = falling | (rising & _goes_up(frame))
            spared = meant[:, None] | _has_no_scale(frame, grown)
            over = growth >= np.where(spared, bounds[1], bounds[0])
            over &= ~meant[:, None] | (_from_next_to_nothing(frame, growth) >= bounds[1])
            over &= ~_converges(frame, np.asarray(over.any(1)))[:, None]
        for row in frame.first_rows(np.asarray(over.any(1))):
            yield self._describe(frame, row, over, growth)

    def _describe(
        self,
        frame: Frame,
        row: int,
        over: Flags,
        growth: Array,
    ) -> Finding:
        rows = frame.by_task.rows(int(frame.by_task.of_row[row]))
        last = int(rows[frame.support[rows]][-1])
        columns = np.flatnonzero(over[row])
        worst = int(columns[np.argmax(np.nan_to_num(growth[last, columns], posinf=1e300))])
        start = float(frame.start_norm[row, worst])
        end = float(frame.block.parameters["norm_after"][last, worst])
        steps = int(frame.step[last]) + 1
        layers = tuple(dict.fromkeys(frame.layer(int(c)) for c in columns))
        text = f"{frame.parameter(worst)} ‖w‖ {start:.5g} → {end:.5g} in {steps} steps"
        return self.at(
            frame,
            row,
            text,
            text,
            layer=layers[0],
            layers=layers,
            evidence={
                "norm_before": start,
                "norm_after": end,
                "growth": float(growth[last, worst]),
                "growth_at_step": float(np.nanmax(growth[row])),
            },
        )


def _converges(frame: Frame, chosen: Flags) -> Flags:
    """``[S]`` tasks with a ``chosen`` row whose steps all lower the loss, and grow shorter.

    Far as they go, to weights of another scale, it is there that they end.
    """
    loss, length = frame.block.scalars["loss"], whole(frame, "update_norm")
    settles = np.zeros(len(frame.by_task), dtype=bool)
    for position in np.flatnonzero(frame.by_task.any(chosen)).tolist():
        rows = frame.by_task.rows(position)
        rows = rows[frame.support[rows]]
        falls = len(rows) > 1 and (np.diff(loss[rows]) < 0).all()
        settles[position] = falls and (np.diff(length[rows]) <= 0).all()
    return np.asarray(settles[frame.by_task.of_row])


def _sizes(frame: Frame) -> Array:
    """``[P]`` the norm of each parameter if its elements were 1."""
    return np.sqrt([max(math.prod(p.shape), 1) for p in frame.block.layout.parameters])


def _from_next_to_nothing(frame: Frame, growth: Array) -> Array:
    """``[S, P]`` growth, beside :data:`_NEXT_TO_NOTHING` where a parameter began below that.

    An image that is drawn, a perturbation: from nothing to something is no explosion.
    """
    with np.errstate(all="ignore"):
        short = _NEXT_TO_NOTHING * _sizes(frame) / frame.start_norm
    return np.where(short > 1, growth / short, growth)


def _goes_up(frame: Frame) -> Flags:
    """``[S]`` where every parameter goes up its gradient: a reward is meant to rise."""
    rates = frame.block.parameters["step_rate"]
    seen = np.isfinite(rates)
    return np.asarray(seen.any(1) & ((rates < 0) | ~seen).all(1))


def _climbs(frame: Frame) -> Flags:
    """``[S]`` tasks most of whose steps go up, in what is no weight of a model."""
    if not frame.is_nameless:
        return np.zeros(len(frame.block), dtype=bool)
    up = frame.support & _goes_up(frame)
    mostly = 2 * frame.by_task.count(up) > frame.by_task.count(frame.support)
    return np.asarray(mostly[frame.by_task.of_row])


def _lowest_from_here(frame: Frame, chosen: Flags, sign: float = 1.0) -> Array:
    """``[S]`` the lowest support loss of the task from this step on, as far as it was seen.

    With ``sign`` -1 the negative of the highest.
    Of the tasks with a row of ``chosen`` (``[S]``); infinite for others.
    Weights before BatchNorm may be thrown far by one step on a few values, and all is well: they
    have no scale.
    """
    losses = np.where(frame.seen, sign * frame.block.scalars["loss"], np.inf)
    result = np.full(len(losses), np.inf)
    for task in np.flatnonzero(frame.by_task.any(chosen)).tolist():
        rows = frame.by_task.rows(task)
        steps = rows[frame.support[rows]]
        result[steps] = np.fmin.accumulate(losses[steps][::-1])[::-1]
    return result


def _has_no_scale(frame: Frame, chosen: Flags) -> Flags:
    """``[S, P]`` where a task's only step made something of weights that were next to nothing.

    A learned context may begin at 1e-3, or at 0, and nothing else is adapted beside it. Its own
    loss was there before the step: what tells is the query's, or weights beyond 1.
    """
    result = np.zeros(frame.growth.shape, dtype=bool)
    sizes = _sizes(frame)
    scalars, after = frame.block.scalars, frame.block.parameters["norm_after"]
    for task in np.flatnonzero(frame.by_task.any(chosen)).tolist():
        rows = frame.by_task.rows(task)
        steps = rows[frame.support[rows]]
        if len(steps) != 1 or frame.step[steps[0]] != 0:
            continue
        asked = rows[frame.query[rows] & (scalars["loss_seen"][rows] > 0)]
        worse = scalars["loss"][asked] >= _DECADE * abs(frame.first_loss[steps[0]])
        if not worse.any():
            result[steps] = after[steps] < sizes
    return result


class LossExplosion(Rule):
    """A support loss grew by decades within one task.

    ## What it does
    Compares each inner step's loss with the task's first, and with the median of the tasks' first
    losses at this line: one sample's loss alone may be anything. Not where most steps go up the
    gradient of what no model owns (an input under attack, say): there it is meant to grow.

    ## Why it is bad
    The steps move away from a solution. Adaptation makes the model worse than no adaptation.

    ## Example
    ```python
    fast = [w - 10.0 * g for w, g in zip(fast, grads)]
    ```

    ## Use instead
    ```python
    fast = [w - 0.01 * g for w, g in zip(fast, grads)]
    ```

    ## References
    Nesterov, Lectures on Convex Optimization, 2018, section 1.2.3.
    """

    code = "LG001"
    name = "loss-explosion"
    severity = Severity.ERROR

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._usual = UsualLoss()

    def check(self, frame: Frame) -> Iterator[Finding]:
        """One finding a task, at the first step whose loss passed the bound."""
        self._usual.note(frame)
        losses, bound = frame.block.scalars["loss"], self.thresholds["loss-growth"]
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.fmax(np.abs(frame.first_loss), LITTLE)
            over = frame.support & np.asarray(losses / scale >= bound)
            if over.any():  # beside its own first loss; then beside what is usual, too
                over &= np.asarray(losses / np.fmax(scale, self._usual.of(frame)) >= bound)
                over &= ~_climbs(frame)
        for row in frame.first_rows(over):
            first, here = float(frame.first_loss[row]), float(losses[row])
            step = int(frame.step[row])
            yield self.at(
                frame,
                row,
                f"the support loss grew from {first:.4g} to {here:.4g} by step {step}",
                f"loss {first:.4g} → {here:.4g}",
                evidence={"first_loss": first, "loss": here},
            )
