"""``probe rule``: what a rule is about."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import TYPE_CHECKING

from divergence_probe.commands.base import Command
from divergence_probe.errors import UsageError

if TYPE_CHECKING:
    from divergence_probe.rules.base import Rule


class RuleCommand(Command):
    """Explain a rule: what it does, why it is bad, an example, what to use instead, references.

    On a terminal the text is laid out; elsewhere it is Markdown.
    """

    name = "rule"
    order = 5
    usage = "probe rule CODE... | --all"

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """The codes, or all of them."""
        parser.add_argument("codes", metavar="CODE", nargs="*", help="a rule's code or its name")
        parser.add_argument("--all", action="store_true", help="every rule, with an index first")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the documentation."""
        from divergence_probe.rules.registry import all_rules

        rules = all_rules()
        if arguments.all:
            _show("\n".join([_index(rules), *map(_document, rules)]))
            return 0
        if not arguments.codes:
            raise UsageError("Name a rule, such as `probe rule BN001`, or add --all.")
        _show("\n".join(_document(_find(code, rules)) for code in arguments.codes))
        return 0


def _find(code: str, rules: tuple[type[Rule], ...]) -> type[Rule]:
    """The rule with this code or name, whatever its case.

    Raises:
        UsageError: there is none; the closest is named.
    """
    known = {text.lower(): rule for rule in rules for text in (rule.code, rule.name)}
    if code.lower() in known:
        return known[code.lower()]
    close = difflib.get_close_matches(code.lower(), known, n=1, cutoff=0.5)
    meant = f" Did you mean {known[close[0]].code} ({known[close[0]].name})?" if close else ""
    raise UsageError(f"There is no rule {code!r}.{meant} `probe rule --all` lists the rules.")


def _index(rules: tuple[type[Rule], ...]) -> str:
    lines = ["| code | name | severity | cause |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {rule.code} | {rule.name} | {rule.severity.label} | {rule.cause or ''} |"
        for rule in rules
    ]
    return "\n".join(["# Rules", "", *lines, ""])


def _document(rule: type[Rule]) -> str:
    """The rule's documentation as Markdown."""
    from divergence_probe.rules.base import SECTIONS

    texts = rule.documentation()
    cause = f" · cause `{rule.cause}`" if rule.cause else ""
    parts = [f"# {rule.name} ({rule.code})", f"{rule.severity.label}{cause}"]
    parts += [texts[""]] if texts.get("") else []
    parts += [f"## {title}\n\n{texts[title]}" for title in SECTIONS if texts.get(title)]
    return "\n\n".join(parts) + "\n"


def _show(markdown: str) -> None:
    from divergence_probe.terminal import can_redraw, wants_color, width_of

    if not (can_redraw(sys.stdout) or wants_color(sys.stdout)):
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(markdown.encode(encoding, "replace").decode(encoding))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    colored = wants_color(sys.stdout)
    console = Console(
        width=min(width_of(sys.stdout), 100), force_terminal=True, no_color=not colored
    )
    console.print(Markdown(markdown))
