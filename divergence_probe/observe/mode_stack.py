"""Torch's stack of function modes: where ours may go on it, and how they come off again.

A default device (``torch.set_default_device``, ``with torch.device(...)``) is a mode, too, and must
stay at the very bottom: torch takes it for an error, in the user's run, if it finds another there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

#: How many modes are on it.
height = torch._C._len_torch_function_stack


def modes() -> list[TorchFunctionMode]:
    """Those that are on now, from the bottom; without those that handle a call at this moment."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def put_on(mode: TorchFunctionMode) -> None:
    """Let ``mode`` see calls after every mode of the user's, which then come off as they went on.

    Torch takes off what is on top where a ``with`` ends, whose it may be. What our interventions
    are asked to do comes last: beneath them no tensor is the user's.
    """
    if not height():
        torch._C._push_on_torch_function_stack(mode)
        return
    stack = modes()
    if mode not in stack:
        lowest = sum(isinstance(m, DeviceContext) or hasattr(m, "of_the_probe") for m in stack)
        _replace([*stack[:lowest], mode, *stack[lowest:]])


def take_off(mode: TorchFunctionMode) -> None:
    """Take ``mode`` off, wherever it is; the others stay as they are."""
    if height() == 1 and torch._C._get_function_stack_at(0) is mode:
        torch._C._pop_torch_function_stack()
        return
    stack = modes()
    if mode in stack:
        _replace(other for other in stack if other is not mode)


def _replace(wanted: Iterable[TorchFunctionMode]) -> None:
    for _ in range(height()):
        torch._C._pop_torch_function_stack()
    for mode in wanted:
        torch._C._push_on_torch_function_stack(mode)
