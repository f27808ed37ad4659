"""What was found: one bad operation, where it stands, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from divergence_probe.observe.forensics.backward import is_singular
from divergence_probe.observe.forensics.graph import Range, family, is_leaf_node
from divergence_probe.observe.forensics.windows import FORWARD, UPDATE, Place, Window

if TYPE_CHECKING:
    from divergence_probe.observe.task import Task


@dataclass
class Fault:
    """The first bad operation, as far as it is known.

    Attributes:
        phase: ``"forward"``, ``"backward"``, ``"second backward"`` or ``"update"``.
        what: ``"input"`` (the data came in bad), ``"operation"``, ``"gradient"`` or ``"update"``.
        operation: such as ``"sqrt"``.
        values: of its inputs.
        dtype: of what it made.
        layer: the layer whose parameter it takes, None for none.
        layers: whose gradients or weights turned bad by it.
        module: the module it runs in.
        line: number of its own line, -1 unknown.
        site: number of the gradient call's line.
        place: where to look for its line.
        task: where it happened, None unknown.
        step: inner step, -1 unknown (or after the last).
        output: what became of it: the loss.
        largest: largest magnitude among all finite numbers before it.
        growth: norm of the weights against what it was when the task began; nan unknown.
        certain: whether it was seen to fail, rather than to be the only one that can.
        waited: gradient calls since.
    """

    phase: str
    what: str
    operation: str
    values: Range
    dtype: str
    layer: str | None = None
    layers: tuple[str, ...] = ()
    module: str | None = None
    line: int = -1
    site: int = -1
    place: Place | None = None
    task: Task | None = None
    step: int = -1
    output: float = math.nan
    largest: float = 0.0
    growth: float = math.nan
    certain: bool = True
    waited: int = 0

    def data(self, name: Callable[[int], str | None]) -> dict[str, Any]:
        """Plain values for the event."""
        return {
            "phase": self.phase,
            "what": self.what,
            "operation": self.operation,
            "layer": self.module or self.layer or (self.layers[0] if self.layers else None),
            "layers": list(self.layers),
            "dtype": self.dtype,
            "input_dtype": self.values.dtype,
            "minimum": self.values.minimum,
            "maximum": self.values.maximum,
            "zeros": self.values.zeros,
            "nonfinite": self.values.nonfinite,
            "elements": self.values.elements,
            "loss": self.output,
            "largest": max(self.largest, self.values.magnitude),
            "growth": self.growth,
            "gradient_site": name(self.site),
            "in_task": self.task.index if self.task is not None else -1,
            "in_step": self.step,
            "certain": self.certain,
        }


def locate(node: Any, part: str, window: Window) -> tuple[Place, str]:
    """The user's operation behind a backward node, and where to look for its line.

    A node made while an inner gradient was taken (``create_graph``) is a derivative of a forward
    operation: the one whose result it uses, or the one of its own kind that takes what it takes.
    """
    number = node._sequence_nr()
    name = family(node.name())
    if part == UPDATE:
        return Place(window.site, UPDATE, number - window.after, name), name
    if part == FORWARD:
        return Place(window.site, FORWARD, window.before - number, name), name
    for following, _ in node.next_functions:
        if following is not None and not is_leaf_node(following) and is_singular(following):
            name = family(following.name())
            distance = window.before - following._sequence_nr()
            return Place(window.site, FORWARD, distance, name), name
    taken = None
    for following, _ in node.next_functions:
        if following is not None and not is_leaf_node(following):
            taken = window.before - following._sequence_nr()
    return Place(window.site, FORWARD, None, name, taken), name
