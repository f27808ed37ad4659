"""The whole run in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from divergence_probe.observe.interventions.base import Context, Intervention

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_DRAWS_IN_PLACE = {
    Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.log_normal_, Tensor.cauchy_,
    Tensor.geometric_,
}  # fmt: skip
#: New tensors: their values are made as before, so that every draw is the first run's.
_FACTORIES = {
    torch.rand, torch.randn, torch.normal, torch.rand_like, torch.randn_like, torch.empty,
    torch.zeros, torch.ones, torch.full, torch.tensor, torch.as_tensor, torch.linspace,
    torch.arange, torch.eye, torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like,
}  # fmt: skip


class Float64(Intervention):
    """Model, data and every operation in double precision; the random draws stay the same.

    New tensors are made in the precision asked for and then widened, casts to a lower precision
    widen, and an operation that mixes precisions runs in double. Autocast is off.
    """

    name = "float64"
    description = "model and data in double precision"

    def install(self, context: Context) -> None:
        """Enter the mode for the rest of the process."""
        mode = _Double()
        mode.__enter__()  # type: ignore[no-untyped-call]
        leave: Any = mode.__exit__
        context.patches.add_undo(lambda: leave(None, None, None))

        def off(original: Callable[..., None]) -> Callable[..., None]:
            def __init__(self_: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
                kwargs["enabled"] = False
                original(self_, *args[:2], **kwargs)

            return __init__

        context.patches.set_attribute(torch.amp.autocast_mode.autocast, "__init__", off)


class _Double(TorchFunctionMode):
    of_the_probe = True  # what it follows may be followed on top of it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _CASTS:
            return args[0].double()
        if func in _DRAWS_IN_PLACE and args[0].dtype == torch.float64:
            drawn = func(args[0].detach().float(), *args[1:], **kwargs)
            with torch.no_grad():
                return args[0].copy_(drawn)
        if func in _FACTORIES:
            made = func(*args, **kwargs)
            if made.dtype not in _LOW:
                return made
            return made.detach().double().requires_grad_(made.requires_grad)
        if func is Tensor.to or func is Tensor.type:
            args, kwargs = tree_map(_widened_type, (args, kwargs))
        elif _mixed(args, kwargs) and not func.__name__.endswith("_"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _mixed(args: Any, kwargs: Any) -> bool:
    kinds = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    return torch.float64 in kinds and not kinds.isdisjoint(_LOW)


def _widened(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype in _LOW else leaf


def _widened_type(leaf: Any) -> Any:
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _LOW else leaf
