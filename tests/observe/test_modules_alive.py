"""The search for modules: nothing that lives is missed, and not all is looked at each time."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
from torch import nn

from divergence_probe.observe import modules_alive
from divergence_probe.observe.modules_alive import ModulesAlive


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """Which generations were looked at; the collector moves nothing by itself meanwhile."""
    asked: list[int | None] = []

    class Collector:
        get_stats = staticmethod(gc.get_stats)

        @staticmethod
        def get_objects(generation: int | None = None) -> list[object]:
            asked.append(generation)
            return gc.get_objects(generation)

    monkeypatch.setattr(modules_alive, "gc", Collector)
    gc.disable()
    yield asked
    gc.enable()


def among(found: list[nn.Module], *modules: nn.Module) -> list[bool]:
    return [any(each is module for each in found) for module in modules]


def test_what_is_new_is_found_without_a_look_at_everything(passes: list[int | None]) -> None:
    alive, old = ModulesAlive(), nn.Linear(1, 1)
    assert among(alive.find(), old) == [True]
    new, copied = nn.Linear(1, 1), copy.deepcopy(old)
    found = alive.find()
    assert among(found, old, new, copied) == [True, True, True]
    assert len(set(map(id, found))) == len(found)
    assert passes == [None, 0, 1]


def test_what_the_collector_has_moved_is_looked_for_everywhere(passes: list[int | None]) -> None:
    alive = ModulesAlive()
    alive.find()
    new = nn.Linear(1, 1)
    gc.collect()
    assert among(alive.find(), new) == [True]
    assert passes == [None, None]


@pytest.mark.parametrize("searches", [1, 2])
def test_nothing_is_kept_alive(passes: list[int | None], searches: int) -> None:
    """Not even until the next collection: what was young then holds graphs, say."""
    alive, model = ModulesAlive(), nn.Linear(1, 1)
    gone = weakref.ref(model)
    for _ in range(searches):
        assert among(alive.find(), model) == [True]
    del model
    assert gone() is None
