"""What tensors are made of: which parameters and which gradients went into them, and what else.

Kept by identity, and weakly: a tensor that is gone takes its entry's meaning with it, whoever gets
its address.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor


class Ancestry(NamedTuple):
    """Of what a tensor is made: indices of parameters, and of parameters whose gradients."""

    parameters: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()

    def __or__(self, other: Ancestry) -> Ancestry:
        """Of either's."""
        return Ancestry(self.parameters | other.parameters, self.gradients | other.gradients)

    @property
    def updated(self) -> frozenset[int]:
        """Parameters that went in together with their gradients: it may be what they became."""
        return self.parameters & self.gradients


#: Of nothing that is followed.
UNRELATED = Ancestry()


class Lineage:
    """The tensors made of parameters and gradients since a gradient was taken."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Ancestry]] = {}
        self._cut: dict[int, weakref.ref[Tensor]] = {}
        self._steps: dict[int, tuple[weakref.ref[Tensor], list[weakref.ref[Tensor]]]] = {}

    def clear(self) -> None:
        """Forget all of them."""
        if self._known:
            self._known, self._cut, self._steps = {}, {}, {}

    def __contains__(self, value: object) -> bool:
        """Whether a value may be one of them: the quick question, asked of every argument."""
        return id(value) in self._known

    def of(self, tensor: object) -> Ancestry:
        """What a tensor is made of."""
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else UNRELATED

    def of_all(self, tensors: Iterable[object]) -> Ancestry:
        """What several tensors are made of."""
        found = UNRELATED
        for tensor in tensors:
            found |= self.of(tensor)
        return found

    def add(self, tensor: Tensor, ancestry: Ancestry) -> None:
        """A tensor was made of ``ancestry``, in addition to what it was made of before."""
        self._known[id(tensor)] = weakref.ref(tensor), self.of(tensor) | ancestry

    def drop(self, tensor: Tensor) -> None:
        """A tensor means something else from now on."""
        self._known.pop(id(tensor), None)

    def add_cut(self, tensor: Tensor) -> None:
        """It was made by an operation that ends the graph."""
        self._cut[id(tensor)] = weakref.ref(tensor)

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether it was."""
        reference = self._cut.get(id(tensor))
        return reference is not None and reference() is tensor

    def add_step(self, tensor: Tensor, others: Sequence[Tensor]) -> None:
        """It was made of gradients and of ``others`` that are not followed: maybe a step there."""
        self._steps[id(tensor)] = weakref.ref(tensor), [weakref.ref(other) for other in others]

    def step_from(self, tensor: Tensor) -> list[Tensor] | None:
        """What a tensor is a step from, as far as that is still there; None where it is none."""
        step = self._steps.get(id(tensor))
        if step is None or step[0]() is not tensor:
            return None
        return [other for reference in step[1] if (other := reference()) is not None]
