"""One re-run of ``--confirm``, in a process of its own: the same script with one thing changed.

Not a command: :mod:`divergence_probe.confirmation` starts it, with a file that says what to do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from divergence_probe import runner
from divergence_probe.probe import Probe

STDIN_READ = "stdin-read"
RECORDING = "recording"


def main(folder: str) -> int:
    """Run what ``task.json`` in ``folder`` asks for; the recording goes there too."""
    task: dict[str, Any] = json.loads((Path(folder) / "task.json").read_text(encoding="utf-8"))
    sys.stdin = _EmptyInput(Path(folder) / STDIN_READ)
    target = runner.Target(task["script"], task["module"], tuple(task["arguments"]))
    return runner.run(target, around=lambda: _around(Path(folder), task)).exit_code


@contextlib.contextmanager
def _around(folder: Path, task: dict[str, Any]) -> Iterator[None]:
    from divergence_probe.observe.interventions.base import Context
    from divergence_probe.observe.interventions.registry import all_interventions
    from divergence_probe.observe.stopping import stop_after

    probe = Probe(output=folder / RECORDING, force=True)
    with probe:
        session = probe.session
        context = Context(session, frozenset(task["sites"]))
        try:
            stop_after(context.patches, session, task=task["task"], outer=task["outer"])
            if task["intervention"] is not None:
                all_interventions()[task["intervention"]]().install(context)
            yield
        finally:
            context.patches.undo()


class _EmptyInput(io.TextIOWrapper):
    """Standard input without anything in it, that notes when the script asks for some."""

    def __init__(self, note: Path) -> None:
        super().__init__(open(os.devnull, "rb"))  # noqa: SIM115 - closed with this one
        self._note = note

    def read(self, size: int | None = -1, /) -> str:
        self._note.touch()
        return super().read(size)

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        self._note.touch()
        return super().readline(size)

    def __next__(self) -> str:  # type: ignore[override]
        self._note.touch()
        return super().__next__()
