"""Which part of a step an autograd node was made in: forward, gradient or update.

Only sequence numbers are kept, never nodes. They also find an operation's line later: the same code
makes the same number of nodes, so an operation keeps its distance from its gradient call.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from divergence_probe.observe.task import Task

_MOST_WINDOWS = 1024

FORWARD, GRADIENT, UPDATE = "forward", "gradient", "update"


@dataclass(slots=True)
class Window:
    """One gradient call on this thread's line of nodes.

    Attributes:
        site: number of the user's line it was made at.
        fast: one past the last node of what its inputs were made by; -1 where they are leaves.
        before: the next number when it began.
        after: the next number when it ended; -1 while it runs.
        belongs: its task, where it is known; weak, for a task keeps the tensors of its steps.
        step: inner step within that task, -1 unknown.
        library: whether a library's own step took it, and makes the update before it returns.
    """

    site: int
    fast: int
    before: int
    after: int = -1
    belongs: weakref.ref[Task] | None = None
    step: int = -1
    library: bool = False

    @property
    def task(self) -> Task | None:
        """Its task, where it is known and goes on."""
        return self.belongs() if self.belongs is not None else None


@dataclass(frozen=True, slots=True)
class Place:
    """An operation's position relative to a gradient call at some line.

    Attributes:
        site: the gradient call's line.
        part: ``FORWARD`` counts back from the call, ``UPDATE`` on from its end.
        distance: in nodes.
        operation: what to look for.
        taken: distance of the node that made its input, where the operation's own is not known.
    """

    site: int
    part: str
    distance: int | None
    operation: str
    taken: int | None = None


class Windows:
    """The latest gradient calls of one thread."""

    def __init__(self) -> None:
        self.all: deque[Window] = deque(maxlen=_MOST_WINDOWS)
        self.update_lengths: dict[int, int] = {}

    def open(self, window: Window) -> None:
        """A gradient call begins; what its inputs show tells how long the last update was."""
        last = self.all[-1] if self.all else None
        if last is not None and window.fast > last.after > 0:
            self.update_lengths[last.site] = window.fast - last.after
        self.all.append(window)

    def go_on(self, window: Window, task: Task, step: int) -> None:
        """A gradient call is a task's ``step``; the call before it was its last one."""
        belongs = weakref.ref(task)
        window.belongs, window.step = belongs, step
        last = self.all[-1] if self.all else None
        if step and last is not None and last is not window and last.task is None:
            last.belongs, last.step = belongs, step - 1

    @property
    def last(self) -> Window | None:
        """The latest one."""
        return self.all[-1] if self.all else None

    def unrolled(self, nodes: Sequence[Any], call: Window) -> int | None:
        """Where the gradient call before ``call`` ended, if ``nodes`` go back to before that."""
        ended = [w.after for w in self.all if w.after >= 0 and w is not call]
        if not ended or not nodes or nodes[0]._sequence_nr() >= ended[-1]:
            return None
        return ended[-1]

    def part(self, number: int) -> tuple[str, Window] | None:
        """In which part of which call's step the node ``number`` was made."""
        later: Window | None = None
        for window in reversed(self.all):
            if window.after >= 0 and number >= window.after:
                update = number - window.after < self.update_lengths.get(window.site, 0)
                if update or later is None:
                    return UPDATE if update else FORWARD, window if update else later or window
                return FORWARD, later
            if number >= window.before:
                return GRADIENT, window
            later = window
        return (FORWARD, later) if later is not None else None
