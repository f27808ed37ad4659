"""States that an optimizer came to and that were kept: going back to one is no new task.

Training keeps its best state and goes back to it, or swaps averaged weights in and out again. Its
weights are loaded anew then, too, but to where its own steps have led, not to where they began.
Another optimizer that begins there, again and again, adapts what was trained before.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from divergence_probe.observe.at_hand import are_same, mark_of, worth_a_wait
from divergence_probe.observe.snapshot import Values, are_equal, elements_of
from divergence_probe.observe.task import Task

# States that are kept in mind, and how large they may be.
_MOST, _LARGEST = 4, 2**24


@dataclass
class _State:
    """Where an optimizer's steps had led: weights in the model's own order, None elsewhere."""

    optimizer: weakref.ref[Any]
    values: Values


class Rollbacks:
    """The states that were asked for last, of models that were being trained in place."""

    def __init__(self) -> None:
        self._states: deque[_State] = deque(maxlen=_MOST)

    def note(self, optimizer: Any, task: Task) -> None:
        """The state of what ``optimizer`` adapts in ``task`` is asked for, and may be kept."""
        if task.last is None or not task.steps or elements_of(task.last.after) > _LARGEST:
            return
        for place, reference in enumerate(task.fast):
            tensor = reference() if reference is not None else None
            if tensor is not None and mark_of(tensor) != task.marks.get(place):
                return  # something else has moved it since
        self._states.append(_State(weakref.ref(optimizer), task.last.after))

    def leads_to(self, optimizer: Any, values: Values) -> bool:
        """Whether an optimizer begins where a state was kept that it had come to itself.

        Args:
            optimizer: that is about to step.
            values: the weights, in the model's own order, None elsewhere.
        """
        return any(
            state.optimizer() is optimizer and _are_same(state.values, values)
            for state in self._states
        )


def _are_same(values: Values, others: Values) -> bool:
    """Whether two sets of weights are equal, and of the same parameters."""
    if len(values) != len(others):
        return False
    return are_equal(values, others) or all(
        are_same(value, other, worth_a_wait) or (value is None and other is None)
        for value, other in zip(values, others, strict=True)
    )
