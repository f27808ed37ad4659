"""Every script of the zoo gets the diagnosis it deserves: the scorer, as one test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.zoo.score import HERE, expectations

ROOT = Path(__file__).parent.parent


def test_every_script_is_expected() -> None:
    """No script without an expectation, no expectation without a script."""
    scripts = {
        str(p.relative_to(HERE))
        for kind in ("faulty", "healthy")
        for p in (HERE / kind).rglob("*.py")
    }
    assert scripts == set(expectations())


@pytest.mark.parametrize("kind", ["faulty/", "healthy/"])
def test_every_fault_is_named_and_no_healthy_script_alarms(kind: str) -> None:
    """Scored in a process of its own, which forks before torch has started any thread."""
    command = [sys.executable, str(HERE / "score.py"), "--only", kind]  # what is installed
    scored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    wrong = [
        line for line in scored.stdout.splitlines() if not line.startswith(("ok", "|", "LAYR"))
    ]
    assert scored.returncode == 0, "\n".join([*wrong, scored.stderr[-2000:]])
