"""Which rules run and which findings are kept: select, ignore and declared intent, in one place."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from divergence_probe.errors import UsageError
from divergence_probe.rules.finding import Finding

if TYPE_CHECKING:
    from divergence_probe.rules.base import Rule

#: What each declared intent makes not worth a remark: causes.
INTENTS: dict[str, frozenset[str]] = {
    "reptile": frozenset({"base-mutated", "first-order-only", "no-meta-gradient"}),
    "continual": frozenset({"base-mutated", "optimizer-state-carryover", "running-stats-leak"}),
    "first-order": frozenset({"first-order-only"}),
    "transductive": frozenset({"transductive-batch-statistics"}),
    "frozen": frozenset({"unused-parameters"}),
    "evaluation": frozenset({"no-meta-gradient", "first-order-only"}),
}


@dataclass(frozen=True)
class Selection:
    """The user's choice of rules, as ruff does it: the longest matching prefix decides.

    An entry is a code or a prefix of some, or ``CODE:GLOB`` for the layers that match the glob; of
    two as long, the one for certain layers decides, then the one that ignores.

    Attributes:
        select: what to keep; empty means all.
        ignore: what to drop. A finding in several layers is dropped where all of them match.
        intent: names of :data:`INTENTS`.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    intent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.intent:
            if name not in INTENTS:
                raise UsageError(f"Unknown intent {name!r}. Choose from: {', '.join(INTENTS)}.")

    def runs(self, rule: type[Rule]) -> bool:
        """Whether the rule can have a finding that is kept."""
        selected = _longest(self.select, rule.code, lambda glob: True) if self.select else _ALL
        return selected > _longest(self.ignore, rule.code, lambda glob: False)

    def keeps(self, finding: Finding) -> bool:
        """Whether a finding is kept."""
        silenced = frozenset[str]().union(*(INTENTS[name] for name in self.intent))
        if finding.cause in silenced:
            return False
        layers = finding.layers or (finding.layer or "",)
        code = finding.rule
        selected = _ALL
        if self.select:
            selected = _longest(self.select, code, lambda glob: any(_in(x, glob) for x in layers))
        return selected > _longest(
            self.ignore, code, lambda glob: all(_in(x, glob) for x in layers)
        )


#: How specific an entry is: the length of its prefix, and whether it is for certain layers.
_NONE, _ALL = (-1, False), (0, False)


def _longest(entries: Iterable[str], code: str, matches: Callable[[str], bool]) -> tuple[int, bool]:
    """The most specific entry that is about ``code``."""
    best = _NONE
    for entry in entries:
        prefix, colon, glob = entry.partition(":")
        if code.startswith(prefix) and (not colon or matches(glob)):
            best = max(best, (len(prefix), bool(colon)))
    return best


def _in(layer: str, glob: str) -> bool:
    # Layers nobody has named have brackets in the names we give them.
    return layer == glob or fnmatch.fnmatchcase(layer, glob)


def parse_codes(
    texts: str | Iterable[str], known: Mapping[str, str], where: str = ""
) -> tuple[str, ...]:
    """Comma-separated codes, prefixes and ``CODE:GLOB`` to a tuple.

    Args:
        texts: one text is the same as a list of it.
        known: every rule's name by its code.
        where: what they were given to, for the error's message.

    Raises:
        UsageError: where no rule's code starts with one of them, or a glob is none.
    """
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{where}: {text!r} is no rule code, such as 'BN003'.".lstrip(": "))
    codes = tuple(code.strip() for text in texts for code in text.split(",") if code.strip())
    for code in codes:
        problem = _problem(code, known)
        if problem:
            raise UsageError(f"{where}: {problem}" if where else problem)
    return codes


def _problem(entry: str, known: Mapping[str, str]) -> str:
    """What is wrong with one entry, and what to write instead; empty for nothing."""
    prefix, colon, glob = entry.partition(":")
    if not any(code.startswith(prefix) for code in known):
        named = [code for code, name in known.items() if name == prefix.lower()]
        close = named or difflib.get_close_matches(prefix.upper(), known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        return (
            f"No rule starts with {prefix!r}.{meant} Write a code (BN003), a prefix (BN), or "
            "either with layers (BN003:backbone.*); `probe rule --all` lists the rules."
        )
    if colon and not glob.strip():
        return (
            f"{entry!r} names no layers. Write a glob after the colon, as in "
            f"{prefix or 'BN003'}:backbone.*, or {prefix or 'BN003'} alone for every layer."
        )
    if colon and "[" in glob and "]" not in glob[glob.rindex("[") :]:
        return (
            f"{entry!r}: the [ in the glob {glob!r} is never closed. Write [0-3] for one of "
            "several characters, or [[] for the bracket itself."
        )
    return ""
