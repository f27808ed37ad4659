"""Gradient clipping, by torch's own functions or by hand: was it used, and did it do anything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from divergence_probe.observe.at_hand import waits_for_nothing
from divergence_probe.observe.operations import Operation
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.session import Session
from divergence_probe.record.schema import FLAGS


def install(patches: Patches, session: Session) -> None:
    """Watch ``clip_grad_norm_`` and ``clip_grad_value_``."""
    for name, changed in (("clip_grad_norm_", _by_norm), ("clip_grad_value_", _by_value)):
        function = getattr(clip_grad, name)
        function = getattr(function, "__wrapped__", function)  # under torch's no_grad decorator
        patches.swap_code(function, partial(_clip, session, changed))


def _clip(
    session: Session, changed: Callable[..., bool | Tensor], original: Callable[..., Any]
) -> Callable[..., Any]:
    guard = session.guard

    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not guard.watching:
            return original(parameters, *args, **kwargs)
        tensors: list[Tensor] = []
        with guard.work():
            if not isinstance(parameters, Tensor):
                parameters = list(parameters)  # a generator can be read only once
            tensors = [parameters] if isinstance(parameters, Tensor) else parameters
            largest = _largest(tensors) if changed is _by_value else None
        with guard.inside():
            result = original(parameters, *args, **kwargs)
        with guard.work():
            bound: Any = args[0] if args else kwargs.get("max_norm", kwargs.get("clip_value"))
            session.clipped = changed(result, largest, float(bound))
            if changed is _by_norm and isinstance(result, Tensor) and waits_for_nothing(result):
                session.unclipped = float(result)
        return result

    return clip


def _largest(parameters: list[Tensor]) -> float | Tensor | None:
    """The largest magnitude among gradients: a tensor where it is not at hand."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    if all(map(waits_for_nothing, gradients)):
        return max((float(g.abs().max()) for g in gradients), default=None)
    if len({gradient.device for gradient in gradients}) > 1:
        return None
    return torch.stack([gradient.abs().max().float() for gradient in gradients]).max()


def _by_norm(result: Any, largest: float | Tensor | None, bound: float) -> bool | Tensor:
    """Whether the total norm was above the bound: a tensor where it is not at hand."""
    if not isinstance(result, Tensor):
        return False
    above = result.detach() > bound
    return bool(above) if waits_for_nothing(result) else above


def _by_value(result: Any, largest: float | Tensor | None, bound: float) -> bool | Tensor:
    return largest is not None and largest > bound


def note_clipping(
    pending: Pending, operation: Operation, given: Tensor, made: Tensor, arguments: Any
) -> None:
    """A gradient was clipped by hand; whether that changed it is read later if not at hand.

    By its norm where a single number is bounded by one, and by nothing else: the factor of the
    gradient, which shrinks it below that bound, or its norm, which it is divided by. Other single
    numbers made of gradients (a norm that is kept from zero) are no gradients.

    Args:
        pending: the gradient.
        operation: the one that clips.
        given: what it was given.
        made: what came out.
        arguments: all it was called with, positional and named.
    """
    if given.dim() == 0:
        positional, named = arguments
        bounds = [*positional[1:], *(named or {}).values()]
        if [bound for bound in bounds if bound is not None] != [1]:
            return
        given = torch.ones_like(made)
    pending.flags |= FLAGS["clippable"]
    if operation.in_place or (waits_for_nothing(given) and not torch.equal(made, given)):
        pending.flags |= FLAGS["clipped"]
    elif not waits_for_nothing(given):
        pending.clipped.append((made != given).any())
