"""Whether loops that update in place are inner loops, or ordinary training.

In place, one inner loop looks like any training loop. What makes it nested is that it starts over:
from a copy of a base, from restored weights, or (Reptile) from weights moved between two runs of
steps. Until one of these is seen a task is provisional and nothing is reported of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from divergence_probe.observe.at_hand import all_same, worth_a_wait
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import is_fresh

#: Ordinary training may touch its weights between steps (clamping, averaging); after single steps
#: that says nothing, after several equal runs of so many steps it is a loop around a loop.
STEPS_A_RUN = 2
_EQUAL_RUNS = 2


@dataclass
class _Start:
    """Where a task began: its weights' values then, and the weights themselves."""

    task: Task
    values: list[Tensor]
    tensors: list[weakref.ref[Tensor]]

    def repeats(self, earlier: _Start) -> bool:
        """Whether this is the same start as an earlier one.

        Weights of zeros (or ones) next to others that live on are no copy of them: that is how any
        parameter begins.
        """
        if not all_same(earlier.values, self.values, worth_a_wait):
            return False
        others = [tensor for r in earlier.tensors if (tensor := r()) is not None]
        own = {id(r()) for r in self.tensors}
        same = not others or any(id(tensor) in own for tensor in others)
        return same or not all(map(is_fresh, self.values))


class Nesting:
    """Watches in-place tasks begin, and confirms those that start over."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.tasks: list[Task] = []
        self._starts: list[_Start] = []
        self._goes_on: list[Task] = []

    def began(
        self,
        task: Task,
        before: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        goes_on: bool = False,
    ) -> None:
        """A task that updates in place began.

        Args:
            task: which.
            before: its weights' values.
            tensors: the weights.
            goes_on: whether those are what the task before left: only its optimizer is new.
        """
        if not task.in_place:
            return
        values = [tensor for tensor in before if tensor is not None]
        start = _Start(task, values, [weakref.ref(t) for t in tensors if t is not None])
        if task.provisional and task.base is not None:
            # A second copy of the same base: one alone may just be trained.
            earlier = [other for other in self.tasks if other.base is task.base]
            for other in (*earlier, task) if earlier else ():
                self._session.confirm(other)
        elif task.provisional:
            if goes_on:
                self._goes_on = [*self._goes_on[-8:], task]
            same = [earlier for earlier in self._starts if earlier.task.known is task.known]
            for other in self._starting_over([*same, start]):
                self._session.confirm(other)
        self.tasks = [*self.tasks[-8:], task]
        self._starts = [*self._starts[-8:], start]

    def goes_back(self, task: Task) -> None:
        """A task began with weights that its own optimizer had come to: training goes on."""
        self.tasks = [*self.tasks[-8:], task]

    def _starting_over(self, starts: Sequence[_Start]) -> list[Task]:
        """The tasks that the last one shows to be inner loops: those since it began like this.

        Either an earlier task began with the very same weights, or several runs of equally many
        steps followed each other, with the weights moved in between.
        """
        tasks = [start.task for start in starts]
        for position, start in enumerate(starts[:-1]):
            if starts[-1].repeats(start):
                return tasks[self._first_run(tasks, position) :]
        if any(task is other for task in tasks[-_EQUAL_RUNS:] for other in self._goes_on):
            return []  # phases of one training, each with an optimizer of its own
        runs = [task.steps for task in tasks[-1 - _EQUAL_RUNS : -1]]
        if len(runs) == _EQUAL_RUNS and len(set(runs)) == 1 and runs[0] >= STEPS_A_RUN:
            for task in tasks[-1 - _EQUAL_RUNS :]:
                task.data["moved_on"] = True  # nothing starts over: what else goes on may, too
            return tasks[-1 - _EQUAL_RUNS :]
        return []

    def _first_run(self, tasks: Sequence[Task], position: int) -> int:
        """The first of the equally long runs of steps that led to ``position``.

        (The first of all often begins with the values its model was made with, not yet reset.)
        """
        while position > 0 and tasks[position] not in self._goes_on:
            if not STEPS_A_RUN <= tasks[position].steps == tasks[position - 1].steps:
                break
            position -= 1
        return position

    def outer_step(self) -> None:
        """An outer optimizer moved a base: copies trained before it were inner loops."""
        for task in self.tasks:
            if task.base is not None:
                self._session.confirm(task)
