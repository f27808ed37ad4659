"""When outer steps were taken, of whatever: which of two moments lie on either side of one."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from divergence_probe.record.schema import Array, Flags
from divergence_probe.rules.base import Frame


class OuterTimes:
    """The outer steps of the latest block of each rank, and the last one before it.

    (Rows of what no task adapts, a learned optimizer, say, are in a block of their own: only its
    events tell a block's rules of them.)
    """

    def __init__(self) -> None:
        self._latest: dict[int, float] = {}
        self._steps: dict[int, list[float]] = {}

    def note(self, frame: Frame, left_out: Sequence[float] = ()) -> None:
        """Take the steps of a block.

        Args:
            frame: the block.
            left_out: when those were taken down that are not to be counted, in seconds.
        """
        rank = frame.block.rank
        steps = [event.seconds for event in frame.events("outer-step")]
        for own in left_out:  # (told right after its row was taken down)
            place = bisect.bisect_left(steps, own)
            del steps[place : place + 1]
        steps.insert(0, self._latest.get(rank, -np.inf))
        self._latest[rank] = steps[-1]
        self._steps[rank] = steps

    def between(self, frame: Frame, earlier: Array, later: Array) -> Flags:
        """``[K]`` whether a step that was counted came between two moments, in seconds.

        Args:
            frame: the block that was noted last.
            earlier: ``[K]`` moments, not before the last step of the block before.
            later: ``[K]`` moments in this block.
        """
        steps = self._steps.get(frame.block.rank, [])
        return np.searchsorted(steps, later) > np.searchsorted(steps, earlier)
