"""Find the commands: every module of this package, and third parties' entry points."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

from divergence_probe import commands
from divergence_probe.commands.base import Command

ENTRY_POINTS = "divergence_probe.commands"


@functools.cache
def all_commands() -> dict[str, type[Command]]:
    """Every command class by name, in the order of ``probe --help``; ours are never replaced."""
    found = {command.name: command for command in _own()}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name in found:
            continue
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # noqa: BLE001 - a broken plugin must not take the rest with it
            print(f"probe: command {entry.name!r} left out: {error!r}", file=sys.stderr)
    return {c.name: c for c in sorted(found.values(), key=lambda c: (c.order, c.name))}


def _own() -> Iterator[type[Command]]:
    for info in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Command)
                and value is not Command
                and value.__module__ == module.__name__
            ):
                yield value
