"""Whether graphs of finished tasks stay alive: by their fast weights, or by what hangs on them.

A backward frees what a graph has saved, and with that most of its memory, unless it was told not to
(``retain_graph=True``): then the loss alone keeps all of it. A graph's nodes are torch's own and
cannot be referred to weakly, so a mark of ours is hung on one (:func:`watched`), to see it go.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from dataclasses import dataclass
from operator import call
from typing import Any

from torch import Tensor

# A meta-batch may rightly keep the graphs of all its tasks until its outer step. How many those are
# is known once outer steps were seen; without any, more than a meta-batch has must be kept, or the
# run must end.
_TASKS_IN_USE = 12
_LARGEST_META_BATCH = 128
_TASKS_KEPT = 6
_COLLECTIONS = 3


class Watched:
    """Lives as long as the node of a graph that it is hung on."""

    __slots__ = ("__weakref__",)


def watched(loss: Tensor) -> weakref.ref[Watched] | None:
    """A reference that is alive as long as the graph of a loss; None where it has none."""
    notes: Any = getattr(loss.grad_fn, "metadata", None)  # a dictionary of each node
    if notes is None:
        return None
    mark = notes["divergence_probe"] = Watched()
    return weakref.ref(mark)


@dataclass
class _Finished:
    """A finished task.

    Attributes:
        number: among all of them.
        site: where it began.
        outer_steps: how many there had been.
        fast: its fast weights.
        graph: that of its query, where a backward left it whole.
    """

    number: int
    site: int
    outer_steps: int
    fast: list[weakref.ref[Tensor]]
    graph: weakref.ref[Watched] | None

    def alive(self) -> bool:
        """Whether its graph is."""
        if self.graph is not None and self.graph() is not None:
            return True
        return any(t is not None and _carries_graph(t) for t in map(call, self.fast))


def _carries_graph(tensor: Tensor) -> bool:
    """Whether a graph hangs on a tensor, or on the gradient a ``create_graph`` backward left."""
    if not tensor.is_leaf:
        return True
    return tensor.grad is not None and tensor.grad.grad_fn is not None


class Retention:
    """Counts finished tasks whose graph is still alive although nothing can need it any more."""

    def __init__(self) -> None:
        self._tasks: deque[_Finished] = deque(maxlen=256)
        self._outer_steps = 0
        self._ended = 0
        self._ended_at_outer_step = 0
        self._meta_batch = 0
        self._suspected: tuple[int, int] | None = None
        self._reported = _TASKS_KEPT - 1
        self._collections = 0

    def outer_step(self) -> None:
        """Graphs of the tasks before this outer step have had their last use."""
        self._outer_steps += 1
        if self._outer_steps == 1:
            self._reported = _TASKS_KEPT - 1
        self._meta_batch = max(self._meta_batch, self._ended - self._ended_at_outer_step)
        self._ended_at_outer_step = self._ended

    def ended(
        self,
        site: int,
        fast: list[weakref.ref[Tensor] | None],
        graph: weakref.ref[Watched] | None = None,
    ) -> tuple[int, int] | None:
        """A task ended.

        Args:
            site: where it began.
            fast: its fast weights.
            graph: that of its query, where a backward left it whole.

        Returns:
            ``(number of tasks kept alive, site of the first)`` where that number has grown to
            another doubling, else None.
        """
        self._ended += 1
        references = [reference for reference in fast if reference is not None]
        if references or graph is not None:
            self._tasks.append(_Finished(self._ended, site, self._outer_steps, references, graph))
        if self._ended % 4:
            return None
        grown = self._grown()
        if grown is None or self._outer_steps or grown[0] >= _LARGEST_META_BATCH:
            return grown
        self._suspected = grown  # or the first meta-batch goes on
        return None

    def closed(self) -> tuple[int, int] | None:
        """The run is over: as :meth:`ended`, where no outer step was to come after all."""
        return None if self._outer_steps else self._suspected

    def _grown(self) -> tuple[int, int] | None:
        kept = self._kept()
        if len(kept) > self._reported and self._collections < _COLLECTIONS:
            # Cycles (higher's patched modules are such) only die in a collection.
            self._collections += 1
            gc.collect()
            kept = self._kept()
        if len(kept) <= self._reported:
            return None
        self._reported = 2 * len(kept)
        return len(kept), kept[0].site

    def _kept(self) -> list[_Finished]:
        in_use = max(_TASKS_IN_USE, 2 * self._meta_batch)
        kept: list[_Finished] = []
        waiting: list[_Finished] = []
        for task in self._tasks:
            old = self._ended - task.number >= in_use
            if not old and task.outer_steps + 1 >= self._outer_steps:
                waiting.append(task)
            elif task.alive():
                kept.append(task)
        # A graph that is gone does not come back: what died is not asked after again.
        self._tasks = deque((*kept, *waiting), maxlen=self._tasks.maxlen)
        return kept
