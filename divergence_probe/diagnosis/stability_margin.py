"""How near a run came to the edge where inner steps begin to grow."""

from __future__ import annotations

import math

import numpy as np

from divergence_probe.record.schema import Array, Block, Flags

_EDGE = 2.0  # step size x curvature from which on steps grow


class StabilityMargin:
    """The largest step size x curvature; beyond the edge where loss and gradient grew, too.

    (Where momentum or another batch turns the slope round, it says nothing of the step.)

    Attributes:
        value: it, nan as long as none is known.
    """

    def __init__(self) -> None:
        self.value = math.nan
        #: Loss and squared gradient of the latest step of tasks that go on.
        self._latest: dict[tuple[int, int], Array] = {}

    def feed(self, block: Block, support: Flags) -> None:
        """Take one block, and which of its rows are inner steps (``[S]``)."""
        product = block.scalars["instability"]
        with np.errstate(all="ignore"):
            norms = np.fmax(block.parameters["gradient_norm"], 0.0)
            now = np.stack([block.scalars["loss"], np.square(norms).sum(1)], axis=1)
            grew = (now > self._before(block, support, now)).all(1)
        counted = support & np.isfinite(product) & (grew | (product <= _EDGE))
        if counted.any():
            self.value = float(np.fmax(self.value, product[counted].max()))
        for row, task in zip(
            block.by_task.last(support).tolist(), block.by_task.tasks, strict=True
        ):
            if row >= 0 and task not in block.ended:
                self._latest[block.rank, task] = now[row]
        for task in block.ended:
            self._latest.pop((block.rank, task), None)

    def _before(self, block: Block, support: Flags, now: Array) -> Array:
        """``[S, 2]`` loss and squared gradient one step before each row; nan unknown."""
        previous = block.by_task.previous(support)
        before = np.where(previous[:, None] >= 0, now[previous], np.nan)
        first = block.by_task.first(support).tolist()
        for row, task in zip(first, block.by_task.tasks, strict=True):
            if row >= 0 and (block.rank, task) in self._latest:
                before[row] = self._latest[block.rank, task]
        return before
