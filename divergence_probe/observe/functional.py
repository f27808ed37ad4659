"""``functional_call``: the tensors given to it stand in for the module's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import stateless

from divergence_probe.observe.models import unwrapped
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session


def install(patches: Patches, session: Session) -> None:
    """Watch what both spellings of ``functional_call`` run."""
    patches.swap_code(
        stateless._functional_call, lambda original: _functional_call(session, original)
    )


def _functional_call(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    guard = session.guard

    def functional_call(module: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and guard.watching:
            with guard.work():
                _note(session, module, parameters)
        return original(module, parameters, *args, **kwargs)

    return functional_call


def _note(session: Session, module: nn.Module, parameters: Mapping[str, Any]) -> None:
    known = session.models.register(unwrapped(module))
    for name, tensor in parameters.items():
        position = known.positions.get(name)
        if position is not None and isinstance(tensor, Tensor):
            session.models.note(tensor, known, position)
