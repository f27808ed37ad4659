"""The first bad operation of a backward, by a gradient call of our own under node hooks.

The graph is retained and nothing is accumulated, so the user's own call right after it gives the
very same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from divergence_probe.observe.forensics.graph import Graph, Range, family, finite, saved

#: Operations that can be finite where their first or second derivative is not.
_SINGULAR = frozenset(
    {"sqrt", "norm", "linalg_vector_norm", "acos", "asin", "atan2", "cdist", "std", "cdist_forward"}
)
#: Operations whose derivative is infinite only where they are: harmful behind a mask alone.
_MASKED_SINGULAR = frozenset({"log", "div", "reciprocal", "rsqrt", "log2", "log10"})
_MASKS = frozenset({"where", "masked_fill", "index_put", "masked_select"})
#: Nodes whose backward runs code of the user's: never to be run once more.
_USER_CODE = torch.autograd.function.BackwardCFunction


@dataclass(frozen=True, slots=True)
class Flow:
    """A backward node that made non-finite gradients of finite ones.

    Attributes:
        node: of the graph.
        values: what its operation had kept.
        dtype: of the gradient it made.
        layers: which of the inputs the non-finite values reached.
    """

    node: Any
    values: Range
    dtype: str
    layers: tuple[int, ...]


def risky(graph: Graph) -> list[Any]:
    """Nodes of operations whose derivative can be infinite where they are finite."""
    names = [family(node.name()) for node in graph.nodes]
    masked = any(name in _MASKS for name in names)
    return [
        node
        for node, name in zip(graph.nodes, names, strict=True)
        if name in _SINGULAR
        or (name == "pow" and _fractional(node))
        or (masked and name in _MASKED_SINGULAR)
    ]


def is_singular(node: Any) -> bool:
    """Whether ``node`` belongs to an operation with a singular derivative."""
    name = family(node.name())
    return name in _SINGULAR or (name == "pow" and _fractional(node))


def _fractional(node: Any) -> bool:
    try:
        exponent = float(node._saved_exponent)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return True
    return exponent < 0 or not exponent.is_integer()


def runs_user_code(graph: Graph) -> bool:
    """Whether a backward of this graph would run Python of the user's (or a checkpoint again)."""
    if any(isinstance(node, _USER_CODE) for node in graph.nodes):
        return True
    for node in graph.nodes:
        for attribute in dir(node):
            if attribute.startswith("_raw_saved_"):
                raw = getattr(node, attribute)
                if getattr(raw, "unpack_hook", None) is not None:
                    return True
    return False


@dataclass
class _Traffic:
    """What passed through the nodes: whether it was bad coming in and going out, in order."""

    order: list[Any] = field(default_factory=list)
    into: dict[Any, bool] = field(default_factory=dict)
    out: dict[Any, bool] = field(default_factory=dict)
    edges: set[tuple[Any, int]] = field(default_factory=set)
    dtypes: dict[Any, str] = field(default_factory=dict)

    def hook(self, node: Any) -> Callable[[Any, Any], None]:
        def look(made: Any, taken: Any) -> None:
            self.order.append(node)
            self.into[node] = any(t is not None and not finite(t) for t in taken)
            bad = [i for i, t in enumerate(made) if t is not None and not finite(t)]
            self.out[node] = bool(bad)
            for position in bad:
                self.dtypes.setdefault(node, str(made[position].dtype).removeprefix("torch."))
                if position < len(node.next_functions):
                    self.edges.add((node, position))

        return look


def first_bad(gradient: Callable[..., Any], graph: Graph, inputs: Sequence[Tensor]) -> Flow | None:
    """Take the gradient once more and name the node it turns non-finite at; None where it is sound.

    Args:
        gradient: ``torch.autograd.grad``, unwatched.
        graph: of the loss.
        inputs: what the gradient is taken of.
    """
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not wanted or not graph.complete or runs_user_code(graph):
        return None
    traffic = _Traffic()
    handles = [node.register_hook(traffic.hook(node)) for node in graph.nodes]
    random = torch.get_rng_state()
    try:
        made = gradient(graph.root, wanted, retain_graph=True, allow_unused=True)
    except RuntimeError:  # the user's own call will raise the same
        return None
    finally:
        torch.set_rng_state(random)
        for handle in handles:
            handle.remove()
    if all(g is None or finite(g) for g in made):
        return None
    for node in traffic.order:
        if traffic.out[node] and not traffic.into[node]:
            reached = _reached(traffic, graph, node)
            if reached:
                values = Range.of(entry.value for entry in saved(node))
                return Flow(node, values, traffic.dtypes.get(node, ""), tuple(sorted(reached)))
    return None


def _reached(traffic: _Traffic, graph: Graph, start: Any) -> set[int]:
    """Inputs that non-finite gradients flow to from ``start``; a mask on the way stops them."""
    found: set[int] = set()
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for position, edge in enumerate(node.next_functions):
            if (node, position) not in traffic.edges:
                continue
            if edge in graph.inputs:
                found.add(graph.inputs[edge])
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return found
