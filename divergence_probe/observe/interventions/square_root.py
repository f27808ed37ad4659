"""Square roots in the inner optimizer's update, made differentiable at zero."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from divergence_probe.observe.interventions.base import Context, Intervention

EPS = 1e-12
_IN_PLACE = {torch.sqrt_, Tensor.sqrt_, Tensor.pow_}
_ROOTS = {torch.sqrt, Tensor.sqrt, torch.sqrt_, Tensor.sqrt_}
_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__, Tensor.pow_}


class EpsUnderSquareRoot(Intervention):
    """sqrt(v + eps) for sqrt(v) where v is exactly zero, in updates only.

    d sqrt(v)/dv is infinite at 0. Roots inside a module's forward are the model's own and stay.
    """

    name = "eps-under-sqrt"
    description = "sqrt(v + 1e-12) in the inner optimizer's update"

    def install(self, context: Context) -> None:
        """Enter the mode for the rest of the process."""
        mode = _Shifted()
        mode.__enter__()  # type: ignore[no-untyped-call]
        leave: Any = mode.__exit__
        context.patches.add_undo(lambda: leave(None, None, None))


class _Shifted(TorchFunctionMode):
    of_the_probe = True  # what it follows may be followed on top of it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        root = func in _ROOTS or (func in _POWERS and len(args) > 1 and args[1] == 0.5)
        if root and args[0].requires_grad:
            zero = args[0].detach() == 0
            if bool(zero.any()) and not _in_forward(sys._getframe(1)):
                if func in _IN_PLACE:  # TorchOpt's
                    args[0].add_(zero.to(args[0].dtype) * EPS)
                else:
                    args = (torch.where(zero, args[0] + EPS, args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _in_forward(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False
