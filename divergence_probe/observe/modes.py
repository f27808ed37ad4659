"""Where ``.train()`` and ``.eval()`` are called, and on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task

# Types whose behaviour depends on the mode: a switch above none of them changes nothing.
_MODE_DEPENDENT = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.MultiheadAttention,
)


def install(patches: Patches, session: Session) -> None:
    """Watch ``nn.Module.train`` (``eval`` calls it)."""
    patches.set_attribute(nn.Module, "train", lambda original: _train(session, original))


def mode_dependent(module: nn.Module) -> bool:
    """Whether any module below behaves differently in train and eval mode."""
    return any(isinstance(child, _MODE_DEPENDENT) for child in module.modules())


def _train(session: Session, original: Callable[..., nn.Module]) -> Callable[..., Any]:
    guard = session.guard
    depth = 0

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        nonlocal depth
        if torch.compiler.is_compiling() or depth or not guard.watching:
            return original(self, mode)
        was = self.training
        depth += 1
        try:
            result = original(self, mode)
        finally:
            depth -= 1
        with guard.work():
            if mode_dependent(self):
                _note(session, self, was, mode)
        return result

    return train


def _note(session: Session, module: nn.Module, was: bool, mode: bool) -> None:
    target, task = _target(session, module)
    session.event(
        "mode",
        task,
        session.sites.here(),
        mode="train" if mode else "eval",
        was="train" if was else "eval",
        target=target,
        model=type(module).__name__,
    )


def _target(session: Session, module: nn.Module) -> tuple[str, Task | None]:
    """What was switched, and the open task it matters to.

    ``"base"`` only where the task runs modules of its own (a library's or a deep copy): elsewhere
    the fast weights run through the base's modules, and the switch does reach them.
    """
    for task in reversed(session.open):
        if task.module_names is not None and id(module) in task.module_names:
            return "fast", task
    owner = session.models.owner(module)
    if owner is None:
        return "other", None
    for task in reversed(session.open):
        apart = task.module_names is not None or (task.in_place and task.base is not None)
        if task.known is owner[0]:
            return ("base" if apart else "fast"), task
    return "base", None
