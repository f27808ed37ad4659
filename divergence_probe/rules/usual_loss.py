"""What a task's first loss usually is, line by line: one sample's alone may be anything."""

from __future__ import annotations

from collections import deque

import numpy as np

from divergence_probe.record.schema import Array
from divergence_probe.rules.base import Frame

# Tasks whose first losses say what is usual.
_TASKS = 64
#: Losses below this are as good as none: what else they are a fraction of says nothing.
LITTLE = 1e-2


class UsualLoss:
    """Remembers the first losses of the latest tasks."""

    def __init__(self) -> None:
        self._firsts: dict[tuple[int, float], deque[float]] = {}

    def note(self, frame: Frame) -> None:
        """Count in the tasks that begin in a frame."""
        rows = np.flatnonzero(frame.begins & np.isfinite(frame.first_loss))
        lines = frame.block.scalars["site"][rows].tolist()
        firsts = np.abs(frame.first_loss[rows]).tolist()
        for line, loss in zip(lines, firsts, strict=True):
            known = self._firsts.setdefault((frame.block.rank, line), deque(maxlen=_TASKS))
            known.append(loss)

    def of(self, frame: Frame) -> Array:
        """``[S]`` the median of the latest tasks' first losses at each row's line, 0 unknown."""
        lines = frame.block.scalars["site"]
        result = np.zeros(len(frame.block))
        for line in np.unique(lines).tolist():
            latest = self._firsts.get((frame.block.rank, line))
            if latest:
                result[lines == line] = float(np.median(latest))
        return result
