"""What an intervention is: one thing changed in every inner loop, from the run's first line on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_pre_hook,
)

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session


class Intervention:
    """One change. Subclass it in a file of this package.

    It is put in after the probe's own instruments, so the probe sees the changed program.
    """

    name: ClassVar[str]
    #: What is changed, in words that follow "with".
    description: ClassVar[str]

    def install(self, context: Context) -> None:
        """Put the change in, in the process of a re-run."""
        raise NotImplementedError


@dataclass
class Context:
    """What an intervention works with.

    Attributes:
        session: the watched run.
        sites: the user's lines (``path:line``) at which inner steps were taken in the first run.
        patches: to put the change in with.
    """

    session: Session
    sites: Collection[str]
    patches: Patches = field(default_factory=Patches)

    def at_inner_step(self) -> bool:
        """Whether the user's line running now is one that takes inner steps."""
        sites = self.session.sites
        return sites.name(sites.here()) in self.sites

    def before_steps(self, hook: Callable[[Any, Any, Any], None]) -> None:
        """Run ``hook`` before every ``torch.optim`` step, and before the probe looks at it."""
        handle = register_optimizer_step_pre_hook(hook)
        hooks: Any = _global_optimizer_pre_hooks  # an OrderedDict, whatever its annotation says
        hooks.move_to_end(handle.id, last=False)
        self.patches.add_undo(handle.remove)

    def when_imported(self, library: str, install: Callable[[], None]) -> None:
        """Run ``install`` once ``library`` is there."""
        if library in sys.modules:
            install()
        else:
            finder = _ImportWatch(library, install)
            sys.meta_path.insert(0, finder)
            self.patches.add_undo(lambda: finder.remove())


class _ImportWatch(MetaPathFinder):
    """Calls back once after a library's import; finds nothing itself."""

    def __init__(self, library: str, imported: Callable[[], None]) -> None:
        self._library = library
        self._imported = imported

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._library:
            return None
        self.remove()
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = run  # type: ignore[method-assign]
            run(module)
            self._imported()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
