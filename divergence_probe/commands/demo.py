"""``probe demo``: the same small training twice, once with the classic mistake."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from divergence_probe.commands.base import Command
from divergence_probe.errors import ProbeError

_INTRODUCTIONS = {
    "eval": "1 of 2: meta-test with net.eval(). BatchNorm then uses statistics that were never "
    "trained.",
    "train": "2 of 2: the same with net.train(). Nothing else has changed.",
}
_EXPECTED = {"eval": 1, "train": 0}


class Demo(Command):
    """Watch a small MAML training diverge, and its healthy twin: half a minute, nothing to set up.

    The exit code is 0 where both reports came out as they should.
    """

    name = "demo"
    order = 6

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the demo script in both modes, each in its own process."""
        if importlib.util.find_spec("higher") is None:
            raise ProbeError(
                "the demo trains with the library higher, which is not installed here: "
                "pip install higher"
            )
        script = Path(__file__).resolve().parent.parent / "demo" / "glyph_maml.py"
        ended = {}
        for mode, introduction in _INTRODUCTIONS.items():
            print(f"\n{introduction}\n$ probe run {script.name} --eval-mode {mode}\n", flush=True)
            ended[mode] = _run(script, mode)
        if ended == _EXPECTED:
            print("\nThe first diverged and says why; the second is healthy.")
            return 0
        print(
            f"probe: the demo ended with exit codes {ended}, not {_EXPECTED}: see above.",
            file=sys.stderr,
        )
        return 2


def _run(script: Path, mode: str) -> int:
    command = [sys.executable, "-m", "divergence_probe", "run", "--isolated", "--force"]
    recording = ["-o", str(_recording(mode))]
    return subprocess.run([*command, *recording, str(script), "--eval-mode", mode]).returncode


def _recording(mode: str) -> Path:
    """Under ``.probe/``, so that the commands the report names work; else a temporary folder."""
    folder = Path(".probe") / f"demo-{mode}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="divergence-probe-demo-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp())
