"""Deep copies and restored weights: where in-place inner loops begin and end."""

from __future__ import annotations

import copy
import copyreg
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from divergence_probe.observe.at_hand import are_same, worth_a_wait
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import address_of

# Modules whose states are kept in mind.
_STATES = 8


def install(patches: Patches, session: Session) -> None:
    """Watch copies of models and of parameters, deep or unpickled, and ``load_state_dict``."""
    # (Not at deepcopy itself, which every number in a list goes through.)
    ours = _module(session)
    patches.add_attribute(nn.Module, "__deepcopy__", ours)
    patches.swap_code(parametrize._inject_new_class, lambda original: _without_ours(ours, original))
    patches.set_attribute(
        nn.Parameter, "__deepcopy__", lambda original: _parameter(session, original)
    )
    for rebuild in (torch._utils._rebuild_parameter, torch._utils._rebuild_parameter_with_state):
        patches.swap_code(rebuild, lambda original: _rebuilt(session, original))
    states = _States()
    patches.set_attribute(
        nn.Module, "state_dict", lambda original: _state(session, states, original)
    )
    patches.set_attribute(
        nn.Module, "load_state_dict", lambda original: _load(session, states, original)
    )


def _without_ours(ours: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch see whether a module that it parametrizes has a ``__deepcopy__`` of its own.

    One that has none is given one then, for good; its class may not be pickled.
    """

    def _inject_new_class(*args: Any, **kwargs: Any) -> Any:
        hidden = vars(nn.Module).get("__deepcopy__") is ours
        if hidden:
            delattr(nn.Module, "__deepcopy__")  # noqa: B043 - mypy knows of none
        try:
            return original(*args, **kwargs)
        finally:
            if hidden:
                setattr(nn.Module, "__deepcopy__", ours)  # noqa: B010

    return _inject_new_class


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
                for keep in session.keeping:
                    keep(self)
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


def _rebuilt(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    """What unpickles a parameter."""
    guard, threads = session.guard, session.guard.threads

    def _rebuild_parameter(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if guard.active and not threads.state.away:
            session.models.note_rebuilt(result)
        return result

    return _rebuild_parameter


class _States:
    """The modules whose state was asked for last: what another one loads may be theirs."""

    def __init__(self) -> None:
        self._asked: deque[weakref.ref[nn.Module]] = deque(maxlen=_STATES)

    def note(self, module: nn.Module) -> None:
        """Its ``state_dict()`` was called."""
        if not any(reference() is module for reference in self._asked):
            self._asked.append(weakref.ref(module))

    def origin_of(self, module: nn.Module, state: Any) -> nn.Module | None:
        """The module whose weights ``module`` has just loaded, if that is another one.

        By memory, for a state shares that of its module; where the state was copied by value, which
        is looked at only where that waits for nothing.
        """
        if not self._asked or not isinstance(state, Mapping):
            return None
        own = dict(module.named_parameters())
        for reference in reversed(self._asked):
            origin = reference()
            if origin is None or origin is module or not own:
                continue
            theirs = dict(origin.named_parameters())
            if theirs.keys() == own.keys() and all(
                _is_loaded(own[name], theirs[name], state.get(name)) for name in own
            ):
                return origin
        return None


def _is_loaded(own: Tensor, other: Tensor, value: Any) -> bool:
    if own is other or own.shape != other.shape or not isinstance(value, Tensor):
        return False
    if address_of(value) and address_of(value) == address_of(other):
        return True
    return are_same(own, other, worth_a_wait)


def _state(session: Session, states: _States, original: Callable[..., Any]) -> Callable[..., Any]:
    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        whole = not args and "destination" not in kwargs  # (else as a part of another one)
        if whole and session.guard.watching:
            with session.guard.work():
                states.note(self)
                for keep in session.keeping:
                    keep(self)
        return result

    return state_dict


def _load(session: Session, states: _States, original: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        adapting: list[Task] = []
        if session.guard.watching:
            with session.guard.work():
                adapting = session.adapting(self)
        result = original(self, *args, **kwargs)
        if session.guard.watching:
            with session.guard.work():
                if adapting:
                    session.restored(adapting, session.sites.here())
                state = args[0] if args else kwargs.get("state_dict")
                _note_loaded(session, self, states.origin_of(self, state), adapting)
                if isinstance(state, Mapping):
                    _note_statistics(session, self, state)
                for loaded in session.loaded:
                    loaded(self)
        return result

    return load_state_dict


def _note_statistics(session: Session, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Running statistics that ``module`` has loaded are not what an earlier task left."""
    reloaded = session.reloaded
    for name, buffer in module.named_buffers():
        if name in state and name.endswith("running_mean"):
            forget = functools.partial(reloaded.pop, id(buffer))
            reloaded[id(buffer)] = weakref.ref(buffer, forget)


def _note_loaded(
    session: Session, module: nn.Module, origin: nn.Module | None, adapted: Sequence[Task]
) -> None:
    """``module`` has loaded the weights of ``origin``: it is as good as a deep copy.

    Unless ``origin`` is a copy of it: then that was kept to go back to. Or both are trained by the
    same line: then one of a population has taken over what another had come to.

    Args:
        session: the run.
        module: what has loaded.
        origin: whose weights.
        adapted: the tasks in which ``module`` was adapted in place until then.
    """
    if origin is None:
        return
    models = session.models
    theirs = dict(origin.named_parameters())
    pairs = [(own, theirs[name]) for name, own in module.named_parameters()]
    if any(models.origin_of(other) is own for own, other in pairs):
        return
    if _are_trained_alike(adapted, session.adapting(origin)):
        return
    for own, other in pairs:
        models.note_copy(own, other)
    models.note_module_copy(module, origin)


def _are_trained_alike(ones: Sequence[Task], others: Sequence[Task]) -> bool:
    """Whether two models were each stepped again and again, by one line, and neither is a copy."""
    lines = [
        {task.site for task in tasks if task.base is None and task.steps > 1}
        for tasks in (ones, others)
    ]
    return not lines[0].isdisjoint(lines[1])
