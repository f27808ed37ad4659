"""Find the rules: every module of this package, and third parties' entry points."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable
from importlib.metadata import entry_points

from divergence_probe import rules
from divergence_probe.errors import UsageError
from divergence_probe.rules.base import Rule
from divergence_probe.rules.selection import Selection, parse_codes

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


def select(
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    intent: str | Iterable[str] = (),
    where: str = "{}=",
) -> Selection:
    """The user's choice among these rules, checked.

    Args:
        select: codes, prefixes or ``CODE:GLOB`` to keep.
        ignore: likewise to drop.
        intent: what is meant.
        where: what errors say an option was given to, ``{}`` for its name.

    Raises:
        UsageError: an unknown code or intent, or a bad glob.
    """
    known = {rule.code: rule.name for rule in all_rules()}
    intents = (intent,) if isinstance(intent, str) else tuple(intent)
    try:
        Selection(intent=intents)
    except UsageError as error:
        raise UsageError(f"{where.format('intent')}: {error}") from error
    return Selection(
        parse_codes(select, known, where.format("select")),
        parse_codes(ignore, known, where.format("ignore")),
        intents,
    )


def _subclasses(rule: type[Rule]) -> list[type[Rule]]:
    return [sub for child in rule.__subclasses__() for sub in (child, *_subclasses(child))]
