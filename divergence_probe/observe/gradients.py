"""Gradient calls: ``torch.autograd.grad`` and ``backward``, under any import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session


def install(patches: Patches, session: Session) -> None:
    """Watch the two functions every gradient goes through (``Tensor.backward`` calls one)."""
    patches.swap_code(torch.autograd.grad, lambda original: _grad(session, original))
    patches.swap_code(torch.autograd.backward, lambda original: _backward(session, original))


def _grad(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    guard = session.guard

    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not guard.watching or guard.state.gradient:
            return original(outputs, inputs, *args, **kwargs)
        with guard.work():
            _query(session, outputs)
        with guard.gradient_call():
            return original(outputs, inputs, *args, **kwargs)

    return grad


def _backward(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    guard = session.guard

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not guard.watching or guard.state.gradient:
            return original(tensors, *args, **kwargs)
        with guard.work():
            _query(session, tensors)
        with guard.gradient_call():
            return original(tensors, *args, **kwargs)

    return backward


def _query(session: Session, outputs: Any) -> None:
    loss = outputs if isinstance(outputs, Tensor) else next(iter(outputs), None)
    for task in reversed(session.open):
        if task.steps and task.forwards:
            forwards = task.forwards.take()
            scalar = isinstance(loss, Tensor) and loss.numel() == 1
            session.query(
                task, forwards, loss.detach() if scalar else None, session.sites.here()
            )
            return
