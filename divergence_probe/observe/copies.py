"""Deep copies and restored weights: where in-place inner loops begin and end."""

from __future__ import annotations

import copy
import copyreg
import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task


def install(patches: Patches, session: Session) -> None:
    """Watch deep copies of models and of parameters, and ``load_state_dict``."""
    # (Not at deepcopy itself, which every number in a list goes through.)
    patches.add_attribute(nn.Module, "__deepcopy__", _module(session))
    patches.set_attribute(
        nn.Parameter, "__deepcopy__", lambda original: _parameter(session, original)
    )
    patches.set_attribute(nn.Module, "load_state_dict", lambda original: _load(session, original))


class _Copying(threading.local):
    """Whether this thread is copying a model: its modules are part of it."""

    model = False


def _module(session: Session) -> Callable[..., Any]:
    copying = _Copying()

    def __deepcopy__(self: nn.Module, memo: Any) -> Any:  # noqa: N807
        inherited = getattr(super(nn.Module, self), "__deepcopy__", None)
        copied = inherited or functools.partial(_as_deepcopy_does, self)
        if copying.model:
            return copied(memo)
        copying.model = True
        try:
            result = copied(memo)
        finally:
            copying.model = False
        if isinstance(result, nn.Module) and session.guard.watching:
            with session.guard.work():
                session.models.note_module_copy(result, self)
        return result

    return __deepcopy__


def _as_deepcopy_does(module: nn.Module, memo: Any) -> Any:
    """What ``copy.deepcopy`` does with an object that has no ``__deepcopy__``."""
    reduce = copyreg.dispatch_table.get(type(module))
    reduced = reduce(module) if reduce is not None else module.__reduce_ex__(4)
    if isinstance(reduced, str):
        return module
    return vars(copy)["_reconstruct"](module, memo, *reduced)


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
