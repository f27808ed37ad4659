"""Put every instrument in, follow imports of libraries, and take everything out again."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from divergence_probe.observe import (
    checkpointing,
    clipping,
    copies,
    functional,
    gradients,
    libraries,
    losses,
    modes,
    normalization,
    optimizers,
    process_group,
    swaps,
    transforms,
)
from divergence_probe.observe.loops import Loops
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session

_INSTRUMENTS = (
    normalization,
    losses,
    modes,
    functional,
    clipping,
    copies,
    checkpointing,
    process_group,
    swaps,
)
_LOOP_INSTRUMENTS = (gradients, transforms, optimizers)


class Observer:
    """The instruments of one session, installed while it is active."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._patches = Patches()
        self._imports = _ImportWatch(self._library_imported)

    def install(self) -> None:
        """Start watching. Libraries imported later are met when they are."""
        for instrument in _INSTRUMENTS:
            instrument.install(self._patches, self._session)
        loops = Loops(self._session)
        for loop_instrument in _LOOP_INSTRUMENTS:
            loop_instrument.install(self._patches, self._session, loops)
        for name in library_files():
            adapter = importlib.import_module(f"{libraries.__name__}.{name}")
            if adapter.LIBRARY in sys.modules:
                self._install_library(adapter)
            else:
                self._imports.waiting[adapter.LIBRARY] = adapter
        self._imports.start()

    def uninstall(self) -> None:
        """Stop watching; nothing of ours remains."""
        self._imports.stop()
        self._patches.undo()

    def _library_imported(self, adapter: ModuleType) -> None:
        if self._session.guard.active:
            self._install_library(adapter)

    def _install_library(self, adapter: ModuleType) -> None:
        try:
            adapter.install(self._patches, self._session)
        except Exception as error:  # another version than the ones known: loops are still followed
            self._session.unseen(
                f"{adapter.LIBRARY} could not be watched exactly ({type(error).__name__}: {error})"
            )


def library_files() -> list[str]:
    """Names of the adapter modules under ``observe/libraries``."""
    return [info.name for info in pkgutil.iter_modules(libraries.__path__)]


class _ImportWatch(MetaPathFinder):
    """Calls back once a waited-for library has been imported; finds nothing itself."""

    def __init__(self, imported: Callable[[ModuleType], None]) -> None:
        self.waiting: dict[str, ModuleType] = {}
        self._imported = imported

    def start(self) -> None:
        sys.meta_path.insert(0, self)

    def stop(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        adapter = self.waiting.pop(fullname, None)
        if adapter is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            spec.loader.exec_module = run  # type: ignore[method-assign, union-attr]
            run(module)
            self._imported(adapter)

        try:
            loader.exec_module = exec_module  # type: ignore[method-assign]
        except AttributeError:
            return None
        return spec
