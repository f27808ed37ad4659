"""Tasks by hand that take their inner steps in turn: one goes on after another one has begun.

Nothing tells it of a task that is over, or of one whose results are kept for later, but that a
gradient is taken of its weights again. From then on tasks wait for their next turn at that line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import ref

from torch import Tensor

from divergence_probe.observe.pending import MOST_IN_TURN, Learned
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import are

_IN_TURN = (
    "Tasks take their inner steps in turn, each a step before the next one: the steps taken until "
    "that was found out are missing, or tasks of their own."
)
_LATE = (
    "Weights that tasks came to were kept for later, and nothing used them at once: the first of "
    "these inner steps were not known to be any, and are missing."
)


class Turns:
    """The tasks of one thread that are not its current one, and may go on.

    Attributes:
        parked: those that wait for their next turn.
        left: what the latest that were taken to be over had come to.
    """

    def __init__(self) -> None:
        self.parked: list[Task] = []
        self.left: list[Sequence[ref[Tensor] | None]] = []

    def are_taken(self, learned: Learned, inputs: Sequence[Tensor], session: Session) -> None:
        """Learn it where a gradient is taken of weights that no task has now, but one had."""
        over = any(are(left, inputs) for left in self.left)
        if (over or learned.claims(inputs)) and not learned.in_turn:
            learned.in_turn = True
            rely_on(learned, session, _IN_TURN)

    def leave(self, task: Task, learned: Learned, session: Session) -> bool:
        """Another task begins at a line: whether ``task`` waits there, and is not over."""
        if learned.in_turn and task.learned is learned:
            self.park(task, session)
            return True
        self.left = [*self.left[1 - MOST_IN_TURN :], task.inputs]
        return False

    def park(self, task: Task, session: Session) -> None:
        """``task`` waits; where many do, the one that has waited longest is over."""
        self.parked = [other for other in self.parked if not other.ended]
        if len(self.parked) >= MOST_IN_TURN:
            session.finish_task(self.parked.pop(0))
        self.parked.append(task)

    def take(self, goes_on: Callable[[Task], bool]) -> Task | None:
        """The waiting task that ``goes_on``, if one does; it waits no more."""
        task = next(filter(goes_on, self.parked), None)
        if task is not None:
            self.parked.remove(task)
        return task


def rely_on(learned: Learned, session: Session, reason: str = _LATE) -> None:
    """What is made at a line is used: so were those updates that were taken for none."""
    learned.unclaimed, learned.confirmed = [], max(learned.confirmed, 1)
    session.unseen(reason)
