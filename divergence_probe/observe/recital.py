"""An update that is known by heart: the operations from a gradient to the updated parameters.

Following tensors through every operation is what it takes to learn an update. Once one was learned,
it is enough to hear the same operations again, and to keep what comes out of those that made the
parameters. At the first other operation all that was heard is followed after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped

from divergence_probe.observe.operations import operation_of

#: A longer update is followed every time: what is heard is kept until it is complete.
_MOST_OPERATIONS = 256


class Heard(NamedTuple):
    """One operation: what was called, and what came out."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None
    result: Any

    @property
    def is_plain(self) -> bool:
        """Whether it makes new tensors of its arguments' values, always in the same way."""
        operation = operation_of(self.func)
        special = operation.in_place or operation.foreach or operation.clips or operation.escapes
        return not special


@dataclass(frozen=True, slots=True)
class Script:
    """The operations of one update.

    Attributes:
        lines: in order, what a function mode is handed; which input's updated parameter that makes,
            -1 none; and which of its arguments that input is.
        parameters: how many inputs there are.
        differentiable: whether gradients are enabled.
        cut: whether every gradient in the update is detached.
    """

    lines: tuple[tuple[Any, int, int], ...]
    parameters: int
    differentiable: bool
    cut: bool

    @classmethod
    def of(
        cls,
        heard: Sequence[Heard],
        inputs: Sequence[Tensor | None],
        updated: Sequence[Tensor | None],
        differentiable: bool,
        cut: bool,
    ) -> Script | None:
        """From one time through; None where an update is not so plain.

        Args:
            heard: its operations.
            inputs: the parameters.
            updated: what they became, None for those without a gradient.
            differentiable: as above.
            cut: likewise.
        """
        if len(heard) > _MOST_OPERATIONS or not all(one.is_plain for one in heard):
            return None
        position = {id(one.result): i for i, one in enumerate(heard)}
        makes, takes = [-1] * len(heard), [-1] * len(heard)
        for index, (parameter, tensor) in enumerate(zip(inputs, updated, strict=True)):
            if tensor is None:
                continue
            place = position.get(id(tensor))
            if place is None or is_wrapped(tensor) or parameter is None:
                return None
            given = [i for i, arg in enumerate(heard[place].args) if arg is parameter]
            if not given:
                return None
            makes[place], takes[place] = index, given[0]
        lines = tuple(zip([one.func for one in heard], makes, takes, strict=True))
        return cls(lines, len(inputs), differentiable, cut)


@dataclass(slots=True)
class Recital:
    """One time through a script.

    Attributes:
        script: what is expected.
        inputs: the parameters, the user's own.
        heard: the operations so far; empty once it is complete.
        made: for each input, the updated parameter and its value.
        complete: whether the last operation was heard.
    """

    script: Script
    inputs: Sequence[ref[Tensor]]
    heard: list[tuple[Any, tuple[Any, ...], dict[str, Any] | None, Any]] = field(
        default_factory=list
    )
    made: list[tuple[ref[Tensor], Tensor] | None] = field(default_factory=list)
    complete: bool = False

    def __post_init__(self) -> None:
        self.made = [None] * self.script.parameters

    def hear(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> bool:
        """Take the next operation; False where another one was expected."""
        script, heard = self.script, self.heard
        operation, index, given = script.lines[len(heard)]
        heard.append((func, args, kwargs, result))
        if func != operation:
            return False
        if index >= 0:
            parameter = self.inputs[index]()
            if (
                parameter is None
                or given >= len(args)
                or args[given] is not parameter
                or type(result) is not Tensor
                or result.shape != parameter.shape
                or is_wrapped(result)
                or torch.is_grad_enabled() is not script.differentiable
            ):
                return False
            self.made[index] = ref(result), result.detach()
        if len(heard) == len(script.lines):
            self.complete, self.heard = True, []
        return True
