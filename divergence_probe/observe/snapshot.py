"""Values of a set of tensors, kept for later: copied together, very large ones by reference.

A reference keeps the user's memory from being used again, and what would have been written where
the caches are warm goes to cold memory instead: in a net of a few thousand weights that costs more
than a copy, and in a larger one it scatters the user's heap (see :mod:`.arena`). One vector for the
whole set is one operation to make, and, where it is small, later one to measure.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeGuard, overload

import torch
from torch import Tensor

from divergence_probe.observe.arena import empty
from divergence_probe.observe.at_hand import are_same, waits_for_nothing

#: A set of more elements is measured parameter by parameter, on the CPU: see :func:`most_together`.
MOST_TOGETHER = 2**13
# One of more is kept by reference: to copy it takes longer than what that saves.
_MOST_COPIED = 2**20
_flatten = torch._C._nn.flatten_dense_tensors
# Copying a dozen small tensors is mostly dispatch, and a quarter of that is autograd's, which has
# nothing to note of copies nobody differentiates.
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

Values = Sequence[Tensor | None]


def most_together(tensor: Tensor) -> int:
    """How many elements a set may have to be copied into one vector, and measured as one.

    An accelerator pays for every operation it is given, whatever its size: there it is all that is
    copied at all.

    Args:
        tensor: one of the set.
    """
    return MOST_TOGETHER if waits_for_nothing(tensor) else _MOST_COPIED


# Shapes met, and how many elements they have in all.
_SHAPES: dict[tuple[torch.Size, ...], int] = {}


class Snapshot(Sequence[Tensor]):
    """A copy of several tensors in one vector; as a sequence, views of their shapes.

    Attributes:
        store: the vector ``[M]``, which another set may share: see :func:`pair`.
        start: where their ``N`` elements begin in it, a multiple of ``N``.
        shapes: their shapes.
        size: ``N``.
    """

    __slots__ = ("_parts", "shapes", "size", "start", "store")

    def __init__(
        self, store: Tensor, shapes: tuple[torch.Size, ...], size: int, start: int = 0
    ) -> None:
        self.store = store
        self.shapes = shapes
        self.size = size
        self.start = start
        self._parts: list[Tensor] | None = None

    @property
    def vector(self) -> Tensor:
        """All their elements, ``[N]``."""
        if self.store.numel() == self.size:
            return self.store
        return self.store.narrow(0, self.start, self.size)

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
    shapes = _shapes(tensors)
    size = elements_in(shapes)
    vector = _together(tensors, size)
    if vector is not None:
        return Snapshot(vector, shapes, size)
    return [kept(tensor, copy) if tensor is not None else None for tensor in tensors]


def pair(
    tensors: Values, others: Values, copy: tuple[bool, bool], like: Values | None = None
) -> tuple[Values, Values]:
    """As two calls of :func:`snapshot`, in one copy where they are small.

    Args:
        tensors: as many as ``others``.
        others: each of the same shape, or None where there is none.
        copy: whether the memory of either may be written to before the values are used.
        like: an earlier snapshot of the same shapes, where there is one: they are not asked for.
    """
    if isinstance(like, Snapshot):
        shapes, size = like.shapes, like.size
    else:
        shapes = _shapes(tensors) if not like else ()
        size = elements_in(shapes)
    store = _together([*tensors, *others], size)
    # Both of one kind, or the copy would be of another than theirs.
    if (
        store is not None
        and store.numel() == 2 * size
        and store.dtype is tensors[0].dtype is others[0].dtype  # type: ignore[union-attr]
    ):
        return Snapshot(store, shapes, size), Snapshot(store, shapes, size, size)
    return snapshot(tensors, copy[0]), snapshot(others, copy[1])


def _shapes(tensors: Values) -> tuple[torch.Size, ...]:
    """The shapes of ``tensors``; none where not all are there."""
    try:
        return tuple([tensor.shape for tensor in tensors])  # type: ignore[union-attr]
    except AttributeError:  # None
        return ()


def _together(tensors: Values, size: int) -> Tensor | None:
    """A copy of one set of ``size`` elements, or of several, in one vector.

    None where there is none: too many of them, sparse, not all there, or (larger ones) not alike
    and on the CPU.
    """
    if not 0 < size <= _MOST_COPIED:
        return None
    try:
        with _BelowAutograd():
            if size > MOST_TOGETHER and size > most_together(tensors[0]):  # type: ignore[arg-type]
                return _in_arena(tensors)
            vector: Tensor = _flatten(tensors)  # type: ignore[arg-type]
            return vector.clone() if len(tensors) == 1 else vector  # a single one is not copied
    except (AttributeError, RuntimeError, TypeError):  # (no tuple or list, either)
        return None


def _in_arena(tensors: Values) -> Tensor | None:
    """A copy ``[N]`` in memory of our own; None where they are not alike, or not on the CPU."""
    kinds = {(t.dtype, t.device.type, t.layout) for t in tensors}  # type: ignore[union-attr]
    flat = [tensor.reshape(-1) for tensor in tensors]  # type: ignore[union-attr]
    if kinds != {(flat[0].dtype, "cpu", torch.strided)}:
        return None
    return torch.cat(flat, out=empty(sum(map(Tensor.numel, flat)), flat[0].dtype))


def elements_in(shapes: tuple[torch.Size, ...]) -> int:
    """How many elements tensors of these shapes have in all."""
    known = _SHAPES.get(shapes)
    if known is None:
        known = _SHAPES[shapes] = sum(shape.numel() for shape in shapes)
    return known


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
        return values.size
    return sum(value.numel() for value in values if value is not None)


@functools.lru_cache(maxsize=256)
def _in_order(width: int) -> list[int]:
    return list(range(width))


def is_whole(positions: Sequence[int], width: int) -> bool:
    """Whether ``positions`` are all there are, in the model's own order."""
    return positions == _in_order(width)


def spread(values: Values, positions: Sequence[int], width: int) -> Values:
    """Values at their positions in the model's own order, None elsewhere."""
    if is_whole(positions, width):
        return values  # the same object: what one step made is what the next starts from
    result: list[Tensor | None] = [None] * width
    for value, position in zip(values, positions, strict=True):
        result[position] = value
    return result


def gathered(values: Values, positions: Sequence[int]) -> Values:
    """What stands at ``positions``: the inverse of :func:`spread`."""
    if is_whole(positions, len(values)):
        return values
    return [values[position] for position in positions]


def are_equal(values: Values, others: Values) -> bool:
    """Whether two sets copied together on the CPU are the same; False where that takes looking."""
    if not isinstance(values, Snapshot) or not isinstance(others, Snapshot):
        return False
    return values.shapes == others.shapes and are_same(values.vector, others.vector)


def are_whole(values: Values) -> TypeGuard[Sequence[Tensor]]:
    """Whether none is missing."""
    return isinstance(values, Snapshot) or all(value is not None for value in values)
