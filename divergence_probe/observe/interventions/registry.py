"""Find the interventions: every module of this package."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from divergence_probe.observe import interventions
from divergence_probe.observe.interventions.base import Intervention


@functools.cache
def all_interventions() -> dict[str, type[Intervention]]:
    """Every intervention by name."""
    for info in pkgutil.iter_modules(interventions.__path__):
        importlib.import_module(f"{interventions.__name__}.{info.name}")
    return {kind.name: kind for kind in Intervention.__subclasses__()}
