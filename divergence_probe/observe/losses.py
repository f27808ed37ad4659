"""The last loss that was computed, so that a query evaluated without a gradient has one too."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from divergence_probe.observe.capture import LossCall, next_order
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.tensors import physical

_LOSSES = (
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
    F.multi_margin_loss,
)


def install(patches: Patches, session: Session) -> None:
    """Watch torch's loss functions; loss modules call them too."""
    for function in _LOSSES:
        patches.swap_code(function, lambda original: _loss(session, original))


def _loss(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    guard = session.guard

    def loss(*args: Any, **kwargs: Any) -> Any:
        state = guard.state
        if state.inside or state.own or not guard.active or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        if state.on_stack is not None:
            state.on_stack()  # before torch asks whether there is a mode
        state.inside += 1  # cross_entropy calls nll_loss
        try:
            result = original(*args, **kwargs)
        finally:
            state.inside -= 1
        if state.transform and isinstance(result, Tensor):  # whose value the gradient brings
            losses = session.current_forwards().losses
            losses.append(LossCall(weakref.ref(result), None, next_order()))
        elif isinstance(result, Tensor):
            with state:
                if result.numel() == 1:
                    value = physical(result)[0].detach()
                    call = LossCall(weakref.ref(result), value, next_order())
                    session.current_forwards().losses.append(call)
        return result

    return loss
