"""Every module that is alive, whoever holds it: among the garbage collector's objects."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

from torch import nn

# Searching is for names only: it must not become a cost of its own. Seconds of this thread's own
# time, for a busy machine takes no names away; a few searches are granted to any program.
_SECONDS = 1.0
_GRANTED = 8


class ModulesAlive:
    """Finds them again and again, and looks at all objects (0.1 s for 200,000) only where it must.

    What is new is in the collector's young generations, until it moves what it kept to the oldest.
    """

    def __init__(self) -> None:
        self._met: list[weakref.ref[nn.Module]] = []
        self._collections = -1
        self._seconds = 0.0
        self._searches = 0

    def find(self) -> list[nn.Module]:
        """All of them; none once the time for it is spent."""
        started = time.thread_time()
        self._searches += 1
        if self._seconds > _SECONDS and self._searches > _GRANTED:
            return []
        found = self._find()
        self._seconds += time.thread_time() - started
        return found

    def _find(self) -> list[nn.Module]:
        collections = _moves_to_the_oldest()
        if collections == self._collections:
            # (one by one: a list that is being made is young itself, and must not hold itself)
            young = _modules_among(gc.get_objects(0)) + _modules_among(gc.get_objects(1))
            if collections == _moves_to_the_oldest():
                ids = set(map(id, young))
                met = [m for r in self._met if (m := r()) is not None and id(m) not in ids]
                return [*young, *met]
        found = _modules_among(gc.get_objects())
        self._met, self._collections = list(map(weakref.ref, found)), collections
        return found


def _moves_to_the_oldest() -> int:
    """How often the collector has moved objects to its oldest generation."""
    return sum(generation["collections"] for generation in gc.get_stats()[1:])


def _modules_among(objects: list[Any]) -> list[nn.Module]:
    """Those that are modules (by their class: what stands in for another may be a lie)."""
    return [
        each for each in objects if issubclass(type(each), nn.Module) and "_modules" in vars(each)
    ]
