"""Armed after a fault: sees every torch operation between two gradient calls, with its line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from divergence_probe.observe import mode_stack
from divergence_probe.observe.forensics.graph import Range, finite

if TYPE_CHECKING:
    from divergence_probe.observe.session import Session

sequence_number = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
_MOST_NOTES = 4096
_SPELLINGS = {
    "truediv": "div", "rtruediv": "div", "rdiv": "div", "divide": "div", "rpow": "pow",
    "rsub": "sub", "radd": "add", "rmul": "mul", "multiply": "mul", "vector_norm": "norm",
    "mm": "matmul", "bmm": "matmul", "rmatmul": "matmul", "matrix_norm": "norm", "to": "cast",
    "half": "cast", "bfloat16": "cast", "float": "cast", "conv2d": "conv", "conv1d": "conv",
}  # fmt: skip


def spelled(name: str) -> str:
    """``"__truediv__"`` to ``"div"``."""
    word = name.strip("_")
    return _SPELLINGS.get(word, word)


@dataclass(frozen=True, slots=True)
class Note:
    """One operation as it ran.

    Attributes:
        first: sequence number of the first autograd node it made.
        last: one past its last node; equal to ``first`` where it made none.
        operation: such as ``"log"``.
        site: number of the user's line.
        module: dotted name of the module it ran in, None outside any.
        taken: sequence numbers of the nodes that made its inputs.
        values: range of its inputs, where it made non-finite numbers of finite ones.
        dtype: of its output there.
    """

    first: int
    last: int
    operation: str
    site: int
    module: str | None
    taken: frozenset[int]
    values: Range | None = None
    dtype: str = ""


class CheckingMode(TorchFunctionMode):
    """On the mode stack from one gradient call to the next, while armed."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._names: dict[int, tuple[nn.Module, dict[int, str]]] = {}
        self.notes: list[Note] = []

    def go_on(self) -> None:
        """Go on the mode stack."""
        mode_stack.put_on(self)

    def take_off(self) -> list[Note]:
        """Come off; returns what was seen."""
        mode_stack.take_off(self)
        notes, self.notes, self._names = self.notes, [], {}
        return notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the user's operation, then look at it."""
        if torch.compiler.is_compiling():  # first of all: what follows must not be compiled in
            return func(*args, **(kwargs or {}))
        guard = self._session.guard
        first = sequence_number()
        result = func(*args, **(kwargs or {}))
        if guard.active and guard.state.own == 0:
            with guard.work():
                if len(self.notes) < _MOST_NOTES:
                    self._look(first, func, (args, kwargs or {}), result)
        return result

    def _look(self, first: int, func: Any, arguments: Any, result: Any) -> None:
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name = getattr(func, "__name__", "")
        if not made or name == "__get__":
            return
        taken = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        values, dtype = None, ""
        bad = [t for t in made if not finite(t)]
        if bad and all(finite(t) for t in taken):
            values, dtype = Range.of(taken), str(bad[0].dtype).removeprefix("torch.")
        last = sequence_number()
        if last == first and values is None:
            return
        self.notes.append(
            Note(
                first,
                last,
                spelled(name),
                self._session.sites.here(),
                self._module(),
                frozenset(_producers(taken)),
                values,
                dtype,
            )
        )

    def _module(self) -> str | None:
        """The innermost module being called, by its name in the outermost one."""
        modules: list[nn.Module] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self") if frame.f_code.co_name != "<module>" else None
            if isinstance(owner, nn.Module):
                modules.append(owner)
            frame = frame.f_back
        if not modules:
            return None
        root = modules[-1]
        if id(root) not in self._names:
            names = {id(module): name for name, module in root.named_modules()}
            self._names[id(root)] = (root, names)
        return self._names[id(root)][1].get(id(modules[0]))


def _producers(tensors: Iterable[Tensor]) -> Iterable[int]:
    for tensor in tensors:
        node = tensor.grad_fn
        if node is not None:
            yield node._sequence_nr()
