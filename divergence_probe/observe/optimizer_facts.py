"""What an optimizer says of itself, and a step of it while it is in progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from divergence_probe.observe.at_hand import Mark, waits_for_nothing
from divergence_probe.observe.snapshot import Values

if TYPE_CHECKING:
    from divergence_probe.observe.models import KnownModel
    from divergence_probe.observe.pending import Pending
    from divergence_probe.observe.task import Task


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
                state = state or not waits_for_nothing(value) or bool(value.any())
            elif isinstance(value, Tensor) and not waits_for_nothing(value):
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


@dataclass
class Step:
    """An optimizer step in progress.

    Attributes:
        optimizer: it.
        facts: what it says of itself.
        parameters: what it moves of the model.
        before: their values.
        marks: theirs.
        gradients: theirs, None where there is none.
        pending: the gradient call it acts on; None where its gradients were put there by hand.
        site: number of the user's line.
        known: the model that names them.
        positions: theirs in it.
        outer: whether it is an outer step.
        base: the model they are copies of, if they are.
        disturbed: what only moved them there and back before it.
        carried: what is left in the optimizer from earlier use, where a task may begin.
        goes_on: the task it goes on with.
    """

    optimizer: Any
    facts: OptimizerFacts
    parameters: list[Tensor]
    before: Values
    marks: list[Mark]
    gradients: Values
    pending: Pending | None
    site: int
    known: KnownModel
    positions: list[int]
    outer: bool
    base: KnownModel | None
    disturbed: Task | None = None
    carried: Carried = field(default_factory=Carried)
    goes_on: Task | None = None


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
