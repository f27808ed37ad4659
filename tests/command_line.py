"""Helpers of the command line's tests: small scripts, and ``probe`` in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import divergence_probe

ROOT = Path(divergence_probe.__file__).parents[1]

#: Two tasks of three inner steps; the learning rate decides whether they diverge.
LOOP = """
import sys
import higher, torch

def loop(lr, tasks=2, ways=4):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(ways, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    inner = torch.optim.SGD(net.parameters(), lr=lr)
    outer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for task in range(tasks):
        x, y = torch.randn(16, ways), torch.randn(16, 1)
        outer.zero_grad()
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, steps):
            for step in range(3):
                steps.step(((fast(x) - y) ** 2).mean())
                yield task, step
            ((fast(x) - y) ** 2).mean().backward()
        outer.step()
"""


def write_script(folder: Path, body: str, name: str = "train.py") -> Path:
    """A script that has ``loop(lr)``: a generator of (task, step) after each inner step."""
    path = folder / name
    path.write_text(LOOP + textwrap.dedent(body), encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    """The command line of ``probe`` with these arguments."""
    return [sys.executable, "-m", "divergence_probe", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """The process's environment without what decides on colours, the package importable."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    return kept | {"PYTHONPATH": path, **extra}


def redirected(folder: Path, words: list[str], where: str) -> subprocess.CompletedProcess[str]:
    """A command line that ended in ``folder``, its output redirected as bash is told."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{shlex.join(words)} {where}"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )


def interruptible() -> None:
    """To run first in a child: where the tests run in the background, Ctrl-C is ignored in it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def probe(folder: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``probe`` in ``folder``."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(**options.pop("env", {})),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def strict_json(path: Path) -> dict[str, Any]:
    """The file's content; fails on NaN and Infinity, which are not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {path}")

    content: dict[str, Any] = json.loads(path.read_text(encoding="ascii"), parse_constant=refuse)
    return content
