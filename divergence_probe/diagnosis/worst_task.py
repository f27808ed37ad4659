"""The norms of the task whose parameters grew most."""

from __future__ import annotations

import numpy as np

from divergence_probe.diagnosis.diagnosis import NormTrace
from divergence_probe.record.schema import MISSING, Array, Block, Flags
from divergence_probe.record.task_rows import Numbers

_STEPS_SHOWN = 64
#: Open tasks that are followed: some never say that they have ended.
_TASKS = 16
_SMALL = 0.03


class WorstTask:
    """Norms by step of the task with the largest growth; of the others only that number."""

    def __init__(self) -> None:
        self.growth = 0.0
        self.layer: str | None = None
        self._task: tuple[int, int] | None = None
        self._norms: list[Array] = []
        self._names: tuple[str, ...] = ()
        self._current: dict[tuple[int, int], list[Array]] = {}

    def feed(self, block: Block, support: Flags) -> None:
        """Take one block; ``support`` (``[S]``) are its inner steps."""
        if block.layout.parameters:
            self._compare(block, support)
        for task in block.ended:
            self._current.pop((block.rank, task), None)
        while len(self._current) > _TASKS:
            self._current.pop(next(iter(self._current)))

    def _compare(self, block: Block, support: Flags) -> None:
        first = block.by_task.first(support)
        positions = np.flatnonzero(first >= 0)
        keys = [(block.rank, block.by_task.tasks[position]) for position in positions.tolist()]
        start = block.parameters["norm_before"][first[positions]]
        for number, key in enumerate(keys):
            if key in self._current:
                start[number] = self._current[key][0]
        last = block.by_task.last(support)[positions]
        growth, worst = _growth(start, _end(block, last))
        for number, key in enumerate(keys):
            worse = growth[number] > self.growth or self._task in (None, key)
            if worse or key[1] not in block.ended:
                rows = block.by_task.rows(int(positions[number]))
                norms = self._follow(key, block, rows[support[rows]])
                if worse:
                    self._keep(key, block, norms, growth[number], worst[number])

    def _follow(self, key: tuple[int, int], block: Block, rows: Numbers) -> list[Array]:
        """Add a task's inner steps to its norms."""
        after = block.parameters["norm_after"][rows]
        norms = self._current.setdefault(key, [block.parameters["norm_before"][rows[0]].copy()])
        if len(norms) <= _STEPS_SHOWN:
            norms.extend(after)
        else:
            norms[-1] = after[-1]
        return norms

    def _keep(
        self, key: tuple[int, int], block: Block, norms: list[Array], growth: float, worst: int
    ) -> None:
        names = tuple(info.name for info in block.layout.parameters)
        self.growth = max(growth, 0.0)
        self.layer = names[worst] if growth >= 0 else None
        self._task, self._norms, self._names = key, norms, names

    def traces(self) -> tuple[NormTrace, ...]:
        """Its parameters."""
        if self._task is None:
            return ()
        table = np.stack(self._norms)
        seen = np.flatnonzero((table != MISSING).any(1))
        table = table[: seen[-1] + 1] if len(seen) else table  # (a last step may not be seen)
        table = np.where(table == MISSING, np.nan, table)
        return tuple(
            NormTrace(
                name, self._task[1], tuple(float(x) for x in table[:, i]), _first(table[:, i])
            )
            for i, name in enumerate(self._names)
            if not np.isnan(table[:1, i]).all()
        )


def _first(norms: Array) -> int | None:
    with np.errstate(all="ignore"):
        over = (norms[1:] >= 2 * norms[:-1]) & (norms[:-1] > 0) | ~np.isfinite(norms[1:])
    hits = np.flatnonzero(over)
    return int(hits[0]) if len(hits) else None


def _end(block: Block, last: Numbers) -> Array:
    """Norms after each task's ``last`` row; before it, where it is not known what that made."""
    before, after = block.parameters["norm_before"][last], block.parameters["norm_after"][last]
    return np.where((after == MISSING).all(1)[:, None], before, after)


def _growth(start: Array, end: Array) -> tuple[list[float], list[int]]:
    """``[T]`` each task's largest growth (-1 where none was measured), and of which parameter."""
    with np.errstate(all="ignore"):
        whole = np.sqrt(np.sum(np.where(start == MISSING, 0, start) ** 2, axis=1))[:, None]
        growth = end / np.fmax(start, 1e-12)
    # Small parameters (biases, zero-initialised heads) have no scale of their own to grow from.
    small = (start < _SMALL * whole) | (start <= 0)
    unmeasured = (small & np.isfinite(end)) | (start == MISSING) | (end == MISSING)
    growth = np.where(unmeasured, -1.0, np.where(np.isnan(growth), np.inf, growth))
    return growth.max(axis=1).tolist(), growth.argmax(axis=1).tolist()
