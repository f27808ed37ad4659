"""Find the rules: every module of this package, and third parties' entry points."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points

from divergence_probe import rules
from divergence_probe.rules.base import Rule

ENTRY_POINTS = "divergence_probe.rules"


@functools.cache
def all_rules() -> tuple[type[Rule], ...]:
    """Every rule class, ordered by code."""
    for info in pkgutil.iter_modules(rules.__path__):
        importlib.import_module(f"{rules.__name__}.{info.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    found = {rule.code: rule for rule in _subclasses(Rule) if "code" in vars(rule)}
    return tuple(found[code] for code in sorted(found))


def _subclasses(rule: type[Rule]) -> list[type[Rule]]:
    return [sub for child in rule.__subclasses__() for sub in (child, *_subclasses(child))]
