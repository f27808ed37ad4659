"""Which rows of a block belong to which task: found once a block, for all who ask."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

#: Numbers of rows, or of tasks.
Numbers = npt.NDArray[np.intp]


class TaskRows:
    """Rows of ``[S]`` by task, in the order they were taken; tasks may lie in one another.

    Where a row or a task has none of what was asked for, -1 stands for it.

    Args:
        task: ``[S]`` task index of each row; -1 is of no task, and counts as one here.

    Attributes:
        tasks: the ``T`` task indices, ascending.
        of_row: ``[S]`` position of each row's task in ``tasks``.
    """

    def __init__(self, task: npt.NDArray[np.float64]) -> None:
        indices, of_row = np.unique(task, return_inverse=True)
        self.tasks: list[int] = indices.astype(int).tolist()
        self.of_row: Numbers = of_row

    def __len__(self) -> int:
        return len(self.tasks)

    @cached_property
    def _sorted(self) -> Numbers:
        return np.argsort(self.of_row, kind="stable")

    @cached_property
    def _ends(self) -> list[int]:
        ends: list[int] = np.cumsum(np.bincount(self.of_row, minlength=len(self))).tolist()
        return ends

    def rows(self, position: int) -> Numbers:
        """The rows of one task."""
        start = self._ends[position - 1] if position else 0
        return self._sorted[start : self._ends[position]]

    def reduced(self, function: np.ufunc, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``[T, ...]`` each task's rows of ``values`` (``[S, ...]``) in one: their ``np.fmin``."""
        starts = [0, *self._ends[:-1]] if len(self) else []
        return np.asarray(function.reduceat(values[self._sorted], starts))

    def any(self, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """``[T]`` whether any row of a task is one of ``chosen`` (``[S]``)."""
        result = np.zeros(len(self), bool)
        result[self.of_row[chosen]] = True
        return result

    def count(self, chosen: npt.NDArray[np.bool_]) -> Numbers:
        """``[T]`` how many of ``chosen`` (``[S]``) each task has."""
        return np.bincount(self.of_row[chosen], minlength=len(self))

    def first(self, chosen: npt.NDArray[np.bool_]) -> Numbers:
        """``[T]`` each task's first row of ``chosen`` (``[S]``)."""
        return self._at(np.flatnonzero(chosen)[::-1])

    def last(self, chosen: npt.NDArray[np.bool_]) -> Numbers:
        """``[T]`` each task's last row of ``chosen`` (``[S]``)."""
        return self._at(np.flatnonzero(chosen))

    def _at(self, rows: Numbers) -> Numbers:
        result = np.full(len(self), -1)
        result[self.of_row[rows]] = rows  # of several the last stays
        return result

    def previous(self, chosen: npt.NDArray[np.bool_]) -> Numbers:
        """``[S]`` for each row of ``chosen`` (``[S]``) the one before it of the same task."""
        rows = self._sorted[chosen[self._sorted]]
        follows = np.flatnonzero(np.diff(self.of_row[rows]) == 0) + 1
        result = np.full(len(self.of_row), -1)
        result[rows[follows]] = rows[follows - 1]
        return result
