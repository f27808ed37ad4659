"""Values of a set of tensors, kept for later: small ones copied together, large ones by reference.

A reference keeps the user's memory from being used again, and what would have been written where
the caches are warm goes to cold memory instead: in a net of a few thousand weights that costs more
than a copy. One vector for the whole set is one operation to make, and later one to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, overload

import torch
from torch import Tensor

#: A set of more elements is kept by reference, and measured parameter by parameter.
MOST_TOGETHER = 2**13
_flatten = torch._C._nn.flatten_dense_tensors

Values = Sequence[Tensor | None]

# Shapes met, so that the many snapshots of one model share them: one object less to collect.
_SHAPES: dict[tuple[torch.Size, ...], tuple[torch.Size, ...]] = {}


class Snapshot(Sequence[Tensor]):
    """A copy of several tensors in one vector; as a sequence, views of their shapes.

    Attributes:
        vector: all their elements, ``[N]``.
        shapes: their shapes.
    """

    __slots__ = ("_parts", "shapes", "vector")

    def __init__(self, vector: Tensor, shapes: tuple[torch.Size, ...]) -> None:
        self.vector = vector
        self.shapes = shapes
        self._parts: list[Tensor] | None = None

    @property
    def parts(self) -> list[Tensor]:
        """The copies one by one, sharing the vector's memory."""
        if self._parts is None:
            pieces = torch.split(self.vector, [shape.numel() for shape in self.shapes])
            self._parts = [p.view(shape) for p, shape in zip(pieces, self.shapes, strict=True)]
        return self._parts

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self.parts[index]


def snapshot(tensors: Values, copy: bool) -> Values:
    """The values of ``tensors`` (plain ones, gradients off), None where there is none.

    Args:
        tensors: any shapes, dtypes and devices.
        copy: whether their memory may be written to before the values are used.
    """
    elements = 0
    for tensor in tensors:
        if tensor is None:
            break
        elements += tensor.numel()
    else:
        if 0 < elements <= MOST_TOGETHER:
            try:
                vector = _flatten(tensors)  # type: ignore[arg-type]
                if len(tensors) == 1:
                    vector = vector.clone()  # a single one is not copied
                shapes = tuple([tensor.shape for tensor in tensors])  # type: ignore[union-attr]
                return Snapshot(vector, _SHAPES.setdefault(shapes, shapes))
            except (RuntimeError, TypeError):
                pass  # sparse, or not a tuple or list
    return [kept(tensor, copy) if tensor is not None else None for tensor in tensors]


def kept(tensor: Tensor, copy: bool) -> Tensor:
    """One tensor's value, its own memory where ``copy``."""
    return tensor.detach().clone() if copy else tensor.detach()


def kept_as_stepped(tensor: Tensor) -> Tensor:
    """One value of a library's parameter: leaves are stepped in place, others made anew."""
    return kept(tensor, copy=tensor.is_leaf)


def shapes_of(values: Values) -> Sequence[torch.Size | None]:
    """The shape of each; None where there is none."""
    if isinstance(values, Snapshot):
        return values.shapes
    return [value.shape if value is not None else None for value in values]


def is_empty(values: Values) -> bool:
    """Whether there is not a single one."""
    return not isinstance(values, Snapshot) and all(value is None for value in values)


def elements_of(values: Values) -> int:
    """How many elements there are in all."""
    if isinstance(values, Snapshot):
        return values.vector.numel()
    return sum(value.numel() for value in values if value is not None)


def spread(values: Values, positions: Sequence[int], width: int) -> Values:
    """Values at their positions in the model's own order, None elsewhere."""
    if len(positions) == width and positions == list(range(width)):
        return values  # the same object: what one step made is what the next starts from
    result: list[Tensor | None] = [None] * width
    for value, position in zip(values, positions, strict=True):
        result[position] = value
    return result


def gathered(values: Values, positions: Sequence[int]) -> Values:
    """What stands at ``positions``: the inverse of :func:`spread`."""
    if len(positions) == len(values) and positions == list(range(len(values))):
        return values
    return [values[position] for position in positions]


def are_whole(values: Values) -> TypeGuard[Sequence[Tensor]]:
    """Whether none is missing."""
    return isinstance(values, Snapshot) or all(value is not None for value in values)
