"""Activation checkpointing: whether the recomputation sees the weights the forward saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import checkpoint as checkpointing

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session

#: What a module's parameters are at one moment: identity, memory and version of each.
_Weights = tuple[tuple[int, int, int], ...]


def install(patches: Patches, session: Session) -> None:
    """Watch ``torch.utils.checkpoint.checkpoint``."""
    function = checkpointing.checkpoint
    function = getattr(function, "__wrapped__", function)  # under torch's dynamo decorator
    patches.swap_code(function, lambda original: _checkpoint(session, original))


def _checkpoint(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    guard = session.guard

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not guard.active:
            return original(function, *args, **kwargs)
        region = _Region(session, session.sites.here())

        def watched(*inner: Any, **inner_kwargs: Any) -> Any:
            with region.running():
                return function(*inner, **inner_kwargs)

        return original(watched, *args, **kwargs)

    return checkpoint


class _Region:
    """One checkpointed call: the weights of its first run, compared with those of later ones."""

    def __init__(self, session: Session, site: int) -> None:
        self._session = session
        self._site = site
        self._first: dict[int, _Weights] | None = None
        self._reported = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the region runs, for the first time or again."""
        seen: dict[int, _Weights] = {}
        names: dict[int, nn.Module] = {}

        def before(module: nn.Module, inputs: Any) -> None:
            weights = _weights(module)
            if weights:
                seen.setdefault(id(module), weights)
                names.setdefault(id(module), module)

        handle = register_module_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()
            if self._first is None:
                self._first = seen
            elif not self._reported and self._session.guard.active:
                with self._session.guard.work():
                    self._compare(seen, names)

    def _compare(self, seen: dict[int, _Weights], modules: dict[int, nn.Module]) -> None:
        assert self._first is not None
        for key, weights in seen.items():
            if self._first.get(key, weights) == weights:
                continue
            self._reported = True
            session = self._session
            owner = session.models.owner(modules[key])
            task = session.open[-1] if session.open else None
            session.event(
                "checkpoint-recompute", task, self._site, layer=owner[1] if owner else None
            )
            return


def _weights(module: nn.Module) -> _Weights:
    return tuple(
        (id(p), p.data_ptr(), p._version)
        for p in module._parameters.values()
        if isinstance(p, torch.Tensor)
    )
