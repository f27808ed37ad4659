"""``torch.utils.swap_tensors``: our weak references are no reason for torch to refuse a swap."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session


def install(patches: Patches, session: Session) -> None:
    """Let tensors be swapped that are watched.

    (What that does to a parameter is seen by its memory: see :mod:`.resolution`.)
    """
    patches.swap_code(torch.utils.swap_tensors, lambda original: _swap(session, original))


def _swap(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    """Torch swaps nothing that has weak references, and most parameters have ours by now.

    Those mean the object, whatever it holds.
    """
    names = {**original.__globals__, "weakref": _NoReferences}
    swap = types.FunctionType(original.__code__, names, original.__name__)

    def swap_tensors(t1: Any, t2: Any) -> None:
        (swap if session.guard.active else original)(t1, t2)

    return swap_tensors


class _NoReferences:
    """Stands in for :mod:`weakref`."""

    @staticmethod
    def getweakrefs(_: object) -> list[object]:
        return []
