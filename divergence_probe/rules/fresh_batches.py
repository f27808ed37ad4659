"""Lines where every inner step sees another batch, told by how little gradients foretell of losses.

On one and the same batch the slopes at the two ends of a step give the change of its loss: their
mean times the step (the trapezoid rule), which is off by the change of the curvature only. Where
another batch is drawn, or another dropout mask, the difference between batches comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from divergence_probe.record.schema import Array
from divergence_probe.rules.base import Frame
from divergence_probe.rules.quantities import descent

# A foretold change is right to half of it, if it is more than what a loss of float32 is exact to.
_RIGHT, _LEAST = 0.5, 1e-5
# So many wrong ones, and more than right ones, are no accident.
_WRONG = 3
# A step is short that promises to take away no more of the loss than this.
_SHORT = 0.5


@dataclass
class _Line:
    """How many changes of the loss at one line were as foretold, and how many were not."""

    right: int = 0
    wrong: int = 0


class FreshBatches:
    """Counts, for every line of a rank, how often the loss went as its gradients foretold."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, float], _Line] = {}

    def note(self, frame: Frame, loss: Array, promised: Array) -> Array:
        """Count a frame's steps.

        Args:
            frame: the rows.
            loss: ``[S]`` the loss before each row's previous step; nan unknown.
            promised: ``[S]`` the first-order decrease that step promised.

        Returns:
            ``[S]`` whether by then a row's line was known to see another batch at every step.
        """
        scalars = frame.block.scalars
        product = scalars["instability"]
        with np.errstate(all="ignore"):
            foretold = -promised * (1 - product / 2)
            # Over a long step the curvature changes, and a slope may turn round at a kink.
            told = frame.seen & (np.abs(product) < 1) & (np.abs(promised) < _SHORT * np.abs(loss))
            told &= np.abs(foretold) > _LEAST * np.abs(loss)
            change = scalars["loss"] - loss
            right = told & (np.abs(change - foretold) <= _RIGHT * np.abs(foretold))
        fresh = np.zeros(len(frame.block), dtype=bool)
        for site in np.unique(scalars["site"][frame.seen]).tolist():
            rows = np.flatnonzero(frame.seen & (scalars["site"] == site))
            line = self._lines.setdefault((frame.block.rank, site), _Line())
            rights = line.right + np.cumsum(right[rows])
            wrongs = line.wrong + np.cumsum(told[rows] & ~right[rows])
            fresh[rows] = (wrongs >= _WRONG) & (wrongs > rights)
            line.right, line.wrong = int(rights[-1]), int(wrongs[-1])
        return fresh


def promised_by(frame: Frame) -> tuple[Array, Array]:
    """``[S]`` loss before, and decrease promised by, each row's previous step; nan elsewhere."""
    before = frame.by_task.previous(frame.seen)
    there = before >= 0
    losses = np.where(there, frame.block.scalars["loss"][before], np.nan)
    return losses, np.where(there, descent(frame)[before], np.nan)
