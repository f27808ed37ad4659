"""What an operation does to what it is given, as far as following an update needs to know."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

#: Operations that use a parameter as a weight: what they take is a finished parameter.
_WEIGHT_OPERATIONS = frozenset(
    {
        "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm",
        "baddbmm", "einsum", "tensordot", "embedding", "conv1d", "conv2d", "conv3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "batch_norm", "layer_norm",
        "group_norm", "instance_norm", "rms_norm", "multi_head_attention_forward",
        "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "prelu",
    }
)  # fmt: skip
_IN_PLACE_NAMES = frozenset(
    {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "data.__set__"}
)

#: Operations that give the same numbers another shape, or repeat or take some of them.
_RESHAPING = frozenset(
    {
        "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "view",
        "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze",
        "t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "T.__get__", "mT.__get__",
        "__getitem__", "select", "narrow", "split", "chunk", "unbind",
    }
)  # fmt: skip

#: Operations whose result carries no graph.
_DETACHING = frozenset({"detach", "detach_", "data.__get__"})

#: Operations that bound a gradient element by element.
_CLIPPING = frozenset({"clamp", "clip", "clamp_", "clip_", "hardtanh"})

#: Accesses that lead from a parameter to something that is not made of its value.
_UNRELATED = frozenset({"grad.__get__", "grad.__set__", "shape.__get__", "size", "dim"})

#: Writes that replace a value whatever it was: without a gradient in them, a restore.
_OVERWRITES = frozenset({"copy_", "data.__set__", "fill_", "zero_", "set_", "__setitem__"})

#: Operations that give the same numbers another kind.
_CONVERTS = frozenset(
    {"to", "type", "type_as", "half", "bfloat16", "float", "double", "cpu", "cuda"}
)

#: Operations that take a value out of torch, where it cannot be followed.
_ESCAPES = frozenset({"numpy", "tolist", "__array__"})


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, by its name.

    Attributes:
        name: as torch spells it; a property access says which (``grad.__set__``).
        unrelated: its result is not made of the values it is given.
        foreach: it works on lists.
        overwrites: it replaces a value whatever it was.
        detaches: its result carries no graph.
        uses_weights: what it takes is a finished parameter, what it makes an activation.
        reshapes: its result is its argument's numbers in another shape.
        clips: it bounds its argument element by element.
        escapes: its result is outside of torch.
        in_place: it writes into its first argument.
        converts: its result is its argument's numbers in another kind, or on another device.
    """

    name: str
    unrelated: bool
    foreach: bool
    overwrites: bool
    detaches: bool
    uses_weights: bool
    reshapes: bool
    clips: bool
    escapes: bool
    in_place: bool
    converts: bool

    def into(self, target: object, operands: Iterable[object]) -> Operation:
        """The same that writes into ``target``: anew, unless that is one of its operands, too."""
        anew = all(operand is not target for operand in operands)
        return replace(self, in_place=True, overwrites=anew)


def operation_of(func: Any) -> Operation:
    """The operation behind what a function mode is handed."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        name = f"{getattr(func.__self__, '__name__', '')}.{name}"
    return _operation(name)


@functools.lru_cache(maxsize=4096)
def _operation(name: str) -> Operation:
    trailing = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return Operation(
        name,
        unrelated=name in _UNRELATED,
        foreach=name.startswith("_foreach"),
        overwrites=name in _OVERWRITES,
        detaches=name in _DETACHING,
        uses_weights=name in _WEIGHT_OPERATIONS,
        reshapes=name in _RESHAPING,
        clips=name in _CLIPPING,
        escapes=name in _ESCAPES,
        in_place=name in _IN_PLACE_NAMES or trailing,
        converts=name in _CONVERTS,
    )
