"""Deep copies and restored weights: where in-place inner loops begin and end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task


def install(patches: Patches, session: Session) -> None:
    """Watch ``copy.deepcopy`` of models and parameters, and ``load_state_dict``."""
    patches.swap_code(copy.deepcopy, lambda original: _deepcopy(session, original))
    patches.set_attribute(
        nn.Parameter, "__deepcopy__", lambda original: _parameter(session, original)
    )
    patches.set_attribute(nn.Module, "load_state_dict", lambda original: _load(session, original))


def _deepcopy(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    def deepcopy(x: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(x, *args, **kwargs)
        if args or kwargs:
            return result  # part of a whole that is copied: only whole models are noted
        if isinstance(x, nn.Module) and session.guard.watching:
            with session.guard.work():
                session.models.note_module_copy(result)
        return result

    return deepcopy


def _parameter(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    guard, threads = session.guard, session.guard.threads

    def __deepcopy__(self: nn.Parameter, memo: Any) -> Any:  # noqa: N807
        result = original(self, memo)
        if guard.active and not threads.state.away:
            try:  # (of every parameter, and no operation of torch: lighter than the usual way)
                session.models.note_copy(result, self)
            except Exception as error:
                guard.fail(error)
        return result

    return __deepcopy__


def _load(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        adapting: list[Task] = []
        if session.guard.watching:
            with session.guard.work():
                adapting = session.adapting(self)
        result = original(self, *args, **kwargs)
        if adapting:
            with session.guard.work():
                session.restored(adapting, session.sites.here())
        return result

    return load_state_dict
