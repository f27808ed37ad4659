"""Which rules run and which findings are kept: select, ignore and declared intent, in one place."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
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

    Attributes:
        select: codes or prefixes to keep; empty means all.
        ignore: codes or prefixes to drop; ``CODE:GLOB`` drops it for layers matching the glob.
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
        return self._selected(rule.code) > self._ignored(rule.code, None)

    def keeps(self, finding: Finding) -> bool:
        """Whether a finding is kept."""
        silenced = frozenset[str]().union(*(INTENTS[name] for name in self.intent))
        if finding.cause in silenced:
            return False
        return self._selected(finding.rule) > self._ignored(finding.rule, finding.layer)

    def _selected(self, code: str) -> int:
        """Length of the longest selecting prefix; 0 for 'all', -1 for none."""
        if not self.select:
            return 0
        return max((len(p) for p in self.select if code.startswith(p)), default=-1)

    def _ignored(self, code: str, layer: str | None) -> int:
        """Length of the longest ignoring prefix, -1 for none."""
        longest = -1
        for entry in self.ignore:
            prefix, separator, pattern = entry.partition(":")
            if separator and not fnmatch.fnmatchcase(layer or "", pattern):
                continue
            if code.startswith(prefix):
                longest = max(longest, len(prefix))
        return longest


def parse_codes(texts: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Comma-separated codes and prefixes to a tuple.

    Raises:
        UsageError: where no rule's code starts with one of them.
    """
    codes = tuple(code.strip() for text in texts for code in text.split(",") if code.strip())
    known = list(known)
    for code in codes:
        prefix = code.partition(":")[0]
        if prefix and not any(name.startswith(prefix) for name in known):
            raise UsageError(f"No rule starts with {prefix!r}. `probe rule --all` lists the rules.")
    return codes
