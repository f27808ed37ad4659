"""What a gradient is taken of: names, growth, and what the last step made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from divergence_probe.observe.forensics.backward import risky
from divergence_probe.observe.forensics.graph import Graph, Range, finite
from divergence_probe.observe.tensors import physical

if TYPE_CHECKING:
    from divergence_probe.observe.task import Task

#: What a gradient is taken of; a function where finding out takes a walk over the graph.
Inputs = Sequence[Tensor] | Callable[[], Sequence[Tensor]]
#: Gives each input's position in its model and its name; called only after a fault.
Names = Callable[[Sequence[Tensor]], Sequence[tuple[int, str]]]

# Weights or gradients beyond this were on their way out before any operation failed.
_EXPLODED = 1e6


def given(inputs: Inputs) -> Sequence[Tensor]:
    """The tensors themselves."""
    return inputs() if callable(inputs) else inputs


def nameless(inputs: Sequence[Tensor]) -> Sequence[tuple[int, str]]:
    """Where nobody can name them."""
    return ()


def layers_of(known: Sequence[tuple[int, str]], indices: Sequence[int]) -> tuple[str, ...]:
    """Layers of some inputs, in the model's order."""
    chosen = sorted(known[i] for i in indices if i < len(known) and known[i][1])
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for _, name in chosen))


def made_by(inputs: Inputs) -> int:
    """One past the last node behind the inputs; -1 where they are leaves."""
    node = inputs[-1].grad_fn if not callable(inputs) and inputs else None
    return node._sequence_nr() + 1 if node is not None else -1


def growth(task: Task | None, inputs: Sequence[Tensor]) -> float:
    """Norm of all weights against that at the task's first step; nan where it has none yet."""
    if task is None or task.first is None:
        return math.nan
    start = math.hypot(*(float(t.float().norm()) for t in task.first.before if t is not None))
    now = math.hypot(*(float(physical(t)[0].detach().float().norm()) for t in inputs))
    return now / max(start, 1e-12)


def _exploded(tensors: Sequence[Tensor]) -> bool:
    """Whether finite values are so large that what follows is an overflow like any other."""
    return Range.of(tensors).magnitude > _EXPLODED


@dataclass(frozen=True, slots=True)
class LastStep:
    """An inner step after which the weights are not finite, though they were before it.

    Attributes:
        bad_gradients: layers whose gradient was not finite.
        bad_weights: layers whose weights are not finite after it.
        values: weights and gradients before it.
        dtype: of the first bad weight.
    """

    bad_gradients: tuple[str, ...]
    bad_weights: tuple[str, ...]
    values: Range
    dtype: str

    def overflows(self, graph: Graph) -> bool:
        """Whether its gradient can only have left the range of float16.

        (A scaler skips such steps: then no weights are bad.)

        Args:
            graph: of the next loss, by the same code.
        """
        return self.dtype == "float16" and not risky(graph)


def last_step(task: Task) -> LastStep | None:
    """What a task's last step shows; None where it only went on with an explosion.

    Nor where its loss was bad already: then that is to be looked at, not what came of it. (Where a
    loss is seen only by waiting for a device, that may have been too late.)
    """
    row = task.last
    if row is None or not math.isfinite(row.loss if row.loss is not None else 0.0):
        return None
    before = [t for t in row.before if t is not None]
    gradients = [g for g in row.gradients if g is not None]
    if not before or not all(finite(t) for t in before) or _exploded((*before, *gradients)):
        return None
    parameters = task.known.layout.parameters
    known = [(i, info.name) for i, info in enumerate(parameters)]
    bad = [i for i, g in enumerate(row.gradients) if g is not None and not finite(g)]
    worse = [i for i, t in enumerate(row.after) if t is not None and not finite(t)]
    return LastStep(
        layers_of(known, bad),
        layers_of(known, worse),
        Range.of((*before, *gradients)),
        parameters[worse[0]].dtype if worse else "",
    )
