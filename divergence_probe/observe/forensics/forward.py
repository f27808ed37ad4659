"""The first bad operation of a forward, read from the graph of a non-finite loss.

Nothing is run again but a few elementwise operations on tensors the graph kept. An output counts as
bad where the node's own saved result, a consumer's saved input, or that recomputation is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from divergence_probe.observe.forensics.graph import (
    Graph,
    Range,
    Saved,
    family,
    finite,
    is_leaf_node,
    kept_by,
    saved,
)

#: Operations that keep finite numbers of ordinary size finite: where their output is not and their
#: known input is, the other operand came in bad.
_FAITHFUL = frozenset(
    {
        "add", "sub", "rsub", "neg", "view", "reshape_alias", "t", "transpose", "permute", "sum",
        "mean", "expand", "unsqueeze", "squeeze", "cat", "stack", "index", "select", "slice",
        "clone", "alias", "unsafe_view", "gather", "mul", "where", "masked_fill",
    }
)  # fmt: skip

#: Operations whose output is bad where anything they take is.
_PASSING_ON = frozenset(
    {
        "view", "reshape_alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
        "clone", "alias", "unsafe_view", "add", "sub", "rsub", "neg", "mul", "sum", "mean",
        "linear", "matmul", "mv", "dot", "conv", "native_batch_norm", "native_layer_norm",
    }
)  # fmt: skip

_Values = dict[str, Tensor]


def _quotient(numerator: Tensor | None, divisor: Tensor) -> Tensor:
    """Where the numerator was not kept, only a divisor of 0 tells; else ``KeyError``."""
    if numerator is not None:
        return numerator / divisor
    quotient = torch.ones_like(divisor) / divisor
    if finite(quotient):
        raise KeyError("self")
    return quotient


_RECOMPUTED: dict[str, Callable[[_Values, Any], Tensor]] = {
    "log": lambda v, node: v["self"].log(),
    "log2": lambda v, node: v["self"].log2(),
    "log10": lambda v, node: v["self"].log10(),
    "log1p": lambda v, node: v["self"].log1p(),
    "acos": lambda v, node: v["self"].acos(),
    "asin": lambda v, node: v["self"].asin(),
    "xlogy": lambda v, node: torch.xlogy(v["self"], v["other"]),
    "mul": lambda v, node: v["self"] * v["other"],
    "div": lambda v, node: _quotient(v.get("self"), v["other"]),
    "pow": lambda v, node: v["self"] ** node._saved_exponent,
    "mse_loss": lambda v, node: (v["self"] - v["target"]) ** 2,
    "matmul": lambda v, node: v["self"] @ v["mat2"],
    "linear": lambda v, node: v["mat1"] @ v["mat2"],
}


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a forward went wrong.

    Attributes:
        node: the operation's node.
        operation: such as ``"log"``.
        enters: whether the bad values came in as data, and the operation is only where.
        values: the operation's inputs (the bad data, where they came in so).
        dtype: of its output.
        largest: largest magnitude among all finite numbers up to it.
    """

    node: Any
    operation: str
    enters: bool
    values: Range
    dtype: str
    largest: float = 0.0


def first_bad(graph: Graph, bad: Collection[int] = ()) -> Spot | None:
    """The earliest operation whose inputs are finite and whose output is not, or None.

    Args:
        graph: of the loss.
        bad: which of the graph's inputs are not finite: what they lead to is spoiled by them.
    """
    reading = _Reading(graph, graph.behind(bad))
    for node in graph.nodes:
        spot = reading.data(node)
        if spot is not None:
            return spot
        if reading.output.get(node) is False and not reading.bad_input(node):
            spot = reading.describe(node)
            if spot is not None:
                return spot
    return None


def bad_data(graph: Graph) -> Spot | None:
    """The first operation that takes non-finite data: tensors no weight has touched."""
    reading = _Reading(graph)
    return next((spot for node in graph.nodes if (spot := reading.data(node))), None)


class _Reading:
    """What is known of every node's output: True finite, False not, absent unknown."""

    def __init__(self, graph: Graph, spoiled: Container[Any] = ()) -> None:
        self.graph = graph
        self._spoiled = spoiled
        self.kept: dict[Any, list[Saved]] = {node: saved(node) for node in graph.nodes}
        self.output: dict[Any, bool] = {}
        self._leaves: dict[Any, bool] = {}
        if graph.root.grad_fn in self.kept:
            self.output[graph.root.grad_fn] = finite(graph.root)
        for node in graph.nodes:
            self._read(node)

    def _read(self, node: Any) -> None:
        kept = self.kept[node]
        for entry in kept:
            if entry.result:
                self._note(node, finite(entry.value))
            elif (producer := self._producer(node, entry)) is not None:
                self._note(producer, finite(entry.value))
        if node not in self.output and family(node.name()) in _PASSING_ON and self.bad_input(node):
            self._note(node, False)
        if node not in self.output and (value := self._made_by(node)) is not None:
            self._note(node, finite(value))

    def _made_by(self, node: Any) -> Tensor | None:
        """What ``node``'s operation makes of what was kept, where that is all it takes."""
        again = _RECOMPUTED.get(family(node.name()))
        try:
            return again({e.name: e.value for e in self.kept[node]}, node) if again else None
        except (KeyError, RuntimeError, AttributeError, TypeError):
            return None

    def _note(self, node: Any, good: bool) -> None:
        self.output[node] = self.output.get(node, True) and good

    def _producer(self, node: Any, entry: Saved) -> Any:
        if entry.slot is None:
            return None
        producer, number = node.next_functions[entry.slot]
        if producer is None or number or (producer, number) in self.graph.inputs:
            return None
        return producer

    def data(self, node: Any) -> Spot | None:
        """The spot where non-finite data enters at ``node``, if it does."""
        for entry in self.kept[node]:
            if entry.result or entry.slot is None or finite(entry.value):
                continue
            if node.next_functions[entry.slot][0] is None:
                return self._spot(node, True, [entry.value])
        return None

    def bad_input(self, node: Any) -> bool:
        """Whether something bad is known to have come into ``node``."""
        if node in self._spoiled or self._takes_a_bad_leaf(node):
            return True
        if any(not e.result and not finite(e.value) for e in self.kept[node]):
            return True
        return any(self.output.get(following) is False for following, _ in node.next_functions)

    def _takes_a_bad_leaf(self, node: Any) -> bool:
        """Whether a weight that ``node`` takes is bad: one that is not adapted, but trained."""
        leaves = [f for f, _ in node.next_functions if f is not None and is_leaf_node(f)]
        for leaf in leaves:
            if leaf not in self._leaves:
                variable = getattr(leaf, "variable", None)
                self._leaves[leaf] = variable is None or finite(variable)
        return not all(self._leaves[leaf] for leaf in leaves)

    def describe(self, node: Any) -> Spot | None:
        """The producer at ``node`` or, where it cannot be one, among unknown nodes before it.

        None where such a node only hands on what came into it.
        """
        while _hands_on(node):
            unknown = [
                following
                for following, _ in node.next_functions
                if following in self.kept and following not in self.output
            ]
            if not unknown:
                break
            node = max(unknown, key=lambda following: following._sequence_nr())
            if self.bad_input(node):
                return None
        inputs = [entry.value for entry in self.kept[node] if not entry.result]
        if not inputs:
            made = [self._made_by(f) for f, _ in node.next_functions if f in self.kept]
            inputs = [value for value in made if value is not None]
        # a sum of finite numbers is bad only where the operand the graph did not keep is
        enters = family(node.name()) in ("add", "sub", "rsub") and any(
            following is None for following, _ in node.next_functions
        )
        return self._spot(node, enters, inputs)

    def _spot(self, node: Any, enters: bool, values: list[Tensor]) -> Spot:
        metadata = node._input_metadata
        dtype = str(metadata[0].dtype).removeprefix("torch.") if metadata else ""
        number = node._sequence_nr()
        earlier = (n for n in self.graph.nodes if n._sequence_nr() <= number)
        everything = Range.of(entry.value for n in earlier for entry in self.kept[n])
        return Spot(
            node, family(node.name()), enters, Range.of(values), dtype, everything.magnitude
        )


def _hands_on(node: Any) -> bool:
    """Whether a node keeps finite numbers finite: to divide by 1 or more does, too."""
    if (name := family(node.name())) != "div":
        return name in _FAITHFUL
    divisor = kept_by(node, "other")
    return divisor is not None and bool((divisor.abs() >= 1).all())
