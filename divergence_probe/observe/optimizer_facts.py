"""What an optimizer says of itself: its learning rate, and what is left of earlier use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Carried:
    """What is left in an optimizer from before a task.

    Attributes:
        steps: the largest step count in its state; above 0 it was used before.
        state: whether any moment or momentum buffer holds something.
    """

    steps: float = 0.0
    state: bool = False

    @classmethod
    def of(cls, values: Iterable[object]) -> Carried:
        """From the values of a state; nothing is read from a device that would be waited for."""
        steps, state = 0.0, False
        for value in values:
            if isinstance(value, Tensor) and value.numel() > 1:
                state = state or not value.is_cpu or bool(value.any())
            elif isinstance(value, Tensor) and not value.is_cpu:
                continue
            elif isinstance(value, int | float | Tensor) and not isinstance(value, bool):
                steps = max(steps, float(value))
        return cls(steps, state)


@dataclass(frozen=True, slots=True)
class OptimizerFacts:
    """What is said of an optimizer at a step.

    Attributes:
        name: its class.
        learning_rate: the largest over its parameter groups, None unknown.
        carried: looks through its state; asked only where a task may begin.
    """

    name: str
    learning_rate: float | Tensor | None
    carried: Callable[[], Carried]


def learning_rate_of(groups: Iterable[Mapping[str, Any]]) -> float | Tensor | None:
    """The largest rate of some parameter groups; a learned one is given as it is, detached."""
    rates = [group["lr"] for group in groups if "lr" in group]
    learned = next((rate for rate in rates if isinstance(rate, Tensor)), None)
    if learned is not None:
        return learned.detach()
    return max(map(float, rates), default=None)


def state_values(state: Mapping[Any, Mapping[str, Any]]) -> Iterable[object]:
    """The step counts and buffers of a ``torch.optim`` optimizer's ``state``."""
    for entries in state.values():
        for name, value in entries.items():
            if name == "step" or (isinstance(value, Tensor) and value.numel() > 1):
                yield value
