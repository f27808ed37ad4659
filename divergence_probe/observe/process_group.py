"""Whether the run is one of several that work together: a process group of torch.distributed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session


def install(patches: Patches, session: Session) -> None:
    """Note the process group that is there, or the one that is made later."""
    if not dist.is_available():
        return
    if dist.is_initialized():
        _note(session)
    # torch wraps it in its logging; the innermost function is what every name of it ends in.
    function = inspect.unwrap(dist.init_process_group)
    patches.swap_code(function, lambda original: _noting(session, original))


def _noting(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if session.guard.active:
            with session.guard.work():
                _note(session)
        return result

    return init_process_group


def _note(session: Session) -> None:
    world = dist.get_world_size()
    if world > 1:
        backend = str(dist.get_backend())
        session.event("process-group", rank=dist.get_rank(), world=world, backend=backend)
