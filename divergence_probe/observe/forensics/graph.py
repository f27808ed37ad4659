"""An autograd graph as a list in forward order, and the tensors it saved.

A node's sequence number grows with every node made on a thread, so sorting by it *is* forward
order; no topological sort is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from divergence_probe.observe.tensors import plain

_ACCUMULATE = "torch::autograd::AccumulateGrad"
_RAW = "_raw_saved_"
_RESULTS = ("result", "output", "out")
_FAMILIES = {
    "linalg_vector_norm": "norm",
    "addmm": "linear",
    "mm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "to_copy": "cast",
    "convolution": "conv",
}
#: Position of a saved tensor among the operation's tensor arguments.
_SLOTS = {"self": 0, "input": 0, "other": 1, "weight": 1, "mat1": 1, "batch1": 1, "target": 1}
_MOST_NODES = 20_000


def is_leaf_node(node: Any) -> bool:
    """Whether ``node`` only collects the gradient of a leaf."""
    return bool(node.name() == _ACCUMULATE)


def family(name: str) -> str:
    """``"LogSoftmaxBackward0"`` to ``"log_softmax"``: the operation a node belongs to."""
    stem = re.sub(r"Backward\d*$", "", name)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()
    return _FAMILIES.get(words, words)


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor a node kept for its backward.

    Attributes:
        name: such as ``"self"`` or ``"result"``.
        value: the tensor, free of functorch wrappers.
        slot: which argument of the operation it is; None unknown.
        result: whether it is an output of the node's own operation.
    """

    name: str
    value: Tensor
    slot: int | None
    result: bool


class Graph:
    """Every node behind ``root``, up to what the gradient is taken of.

    Args:
        root: the loss.
        inputs: what its gradient is taken of; nothing behind them is looked at.
    """

    def __init__(self, root: Tensor, inputs: Sequence[Tensor]) -> None:
        self.root = root
        self.inputs: dict[tuple[Any, int], int] = {}
        self._sizes = [tensor.numel() for tensor in inputs]
        self._leaves: dict[int, int] = {}
        for index, tensor in enumerate(inputs):
            if tensor.grad_fn is not None:
                self.inputs[tensor.grad_fn, tensor.output_nr] = index
            else:
                self._leaves[id(tensor)] = index
        self.complete = True
        self.nodes = self._collect()

    def _collect(self) -> list[Any]:
        stops = {node for node, _ in self.inputs}
        start = self.root.grad_fn
        if start is None or start in stops or is_leaf_node(start):
            return []
        seen, stack = {start}, [start]
        while stack:
            for following, _ in stack.pop().next_functions:
                if following is None or following in seen or following in stops:
                    continue
                if is_leaf_node(following):
                    index = self._leaves.get(id(getattr(following, "variable", None)))
                    if index is not None:
                        self.inputs[following, 0] = index
                    continue
                seen.add(following)
                stack.append(following)
            if len(seen) > _MOST_NODES:
                self.complete = False
                break
        return sorted(seen, key=lambda node: node._sequence_nr())

    def parameter(self, node: Any, depth: int = 3) -> int | None:
        """The input ``node`` takes (its weight, where it has a bias too); None for none."""
        found = set()
        for edge in node.next_functions:
            if edge in self.inputs:
                found.add(self.inputs[edge])
            elif depth and edge[0] is not None and len(edge[0].next_functions) == 1:
                index = self.parameter(edge[0], depth - 1)
                found |= {index} if index is not None else set()
        return max(found, key=lambda index: self._sizes[index], default=None)

    def behind(self, chosen: Collection[int]) -> set[Any]:
        """Every node that takes one of the ``chosen`` inputs, or what was made of one."""
        found: set[Any] = set()
        for node in self.nodes if chosen else ():
            taken = node.next_functions
            if any(edge[0] in found or self.inputs.get(edge) in chosen for edge in taken):
                found.add(node)
        return found

    def since(self, number: int) -> None:
        """Forget every node made before ``number``."""
        self.nodes = [node for node in self.nodes if node._sequence_nr() >= number]


def saved(node: Any) -> list[Saved]:
    """What ``node`` kept, but for what a hook would have to compute again (checkpointing)."""
    found = []
    for attribute in dir(node):
        if not attribute.startswith(_RAW):
            continue
        name = attribute.removeprefix(_RAW)
        value = kept_by(node, name)
        if value is not None and value.is_floating_point():
            found.append(Saved(name, value, _slot(node, name), name.startswith(_RESULTS)))
    return found


def kept_by(node: Any, name: str) -> Tensor | None:
    """One tensor that ``node`` kept, by its name; None where it is not there to be read."""
    try:
        raw = getattr(node, _RAW + name)
        saved_tensor = isinstance(raw, torch._C._autograd.SavedTensor)
        if not saved_tensor or getattr(raw, "unpack_hook", None) is not None:
            return None
        value = getattr(node, f"_saved_{name}")
    except (RuntimeError, AttributeError):  # freed, or overwritten since
        return None
    return plain(value).detach() if isinstance(value, Tensor) else None


def _slot(node: Any, name: str) -> int | None:
    arguments = len(node.next_functions)
    if arguments == 1:
        return 0
    slot = _SLOTS.get(name)
    if name in ("mat2", "batch2", "tensor2"):
        slot = 2 if family_takes_bias(node) else 1
    return slot if slot is not None and slot < arguments else None


def family_takes_bias(node: Any) -> bool:
    """Whether the operation's first argument is a bias."""
    return bool(node.name().startswith(("Addmm", "Baddbmm", "Addcmul", "Addcdiv")))


def finite(tensor: Tensor) -> bool:
    """Whether every element is a finite number."""
    tensor = plain(tensor)
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(torch.isfinite(tensor).all())


@dataclass(frozen=True, slots=True)
class Range:
    """The values of one or several tensors, over their finite elements.

    Attributes:
        dtype: of the first of them.
        minimum: nan where nothing is finite.
        maximum: likewise.
        zeros: exact zeros.
        nonfinite: elements that are NaN or infinite.
        elements: all of them.
    """

    dtype: str = ""
    minimum: float = float("nan")
    maximum: float = float("nan")
    zeros: int = 0
    nonfinite: int = 0
    elements: int = 0

    @property
    def magnitude(self) -> float:
        """The largest absolute value; 0 where nothing is finite."""
        return 0.0 if math.isnan(self.minimum) else max(abs(self.minimum), abs(self.maximum))

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Range:
        """The range over all of ``tensors``."""
        values = [plain(t).detach() for t in tensors]
        values = [v for v in values if v.is_floating_point() and not v.is_sparse and v.numel()]
        if not values:
            return cls()
        flat = torch.cat([v.reshape(-1).to("cpu", torch.float64) for v in values])
        good = flat[torch.isfinite(flat)]
        return cls(
            str(values[0].dtype).removeprefix("torch."),
            float(good.min()) if len(good) else float("nan"),
            float(good.max()) if len(good) else float("nan"),
            int((good == 0).sum()),
            len(flat) - len(good),
            len(flat),
        )
