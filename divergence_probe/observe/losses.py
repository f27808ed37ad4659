"""The last loss that was computed, so that a query evaluated without a gradient has one too."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from divergence_probe.observe import mode_stack
from divergence_probe.observe.at_hand import waits_for_nothing
from divergence_probe.observe.capture import MOST_CALLS, LossCall, Number, next_order
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.tensors import (
    are_plain,
    in_plain_torch,
    is_tracing,
    is_unreal,
    physical,
)

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
    guard, inside, is_compiling = session.guard, session.guard.inside(), torch.compiler.is_compiling
    threads, modes_on = guard.threads, mode_stack.height

    def loss(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or is_tracing() or not guard.active or threads.state.away:
            return original(*args, **kwargs)
        if not modes_on() and are_plain((*args, *kwargs.values())):
            result = original(*args, **kwargs)
        else:  # a mode or a class of tensors is handed the call, and calls us again
            with inside:
                result = original(*args, **kwargs)
        if type(result) is Tensor and in_plain_torch() and waits_for_nothing(result):
            if result.numel() == 1:
                _keep(session, result, result.item())
        elif isinstance(result, Tensor) and not is_unreal():
            _note(session, result)
        return result

    return loss


def _note(session: Session, loss: Tensor) -> None:
    """Note a loss whose value the gradient around it will bring, or is to be read later."""
    state = session.guard.state
    if state.transform:
        _keep(session, loss, None)
    else:
        with state:
            if loss.numel() == 1:
                _keep(session, loss, physical(loss)[0].detach())


def _keep(session: Session, loss: Tensor, value: Number) -> None:
    forwards = session.current_forwards() if session.open else session.loose.forwards
    forwards.losses.append(LossCall(weakref.ref(loss), value, next_order()))
    if len(forwards.losses) > MOST_CALLS:
        forwards.trim()
