"""The examples of CONTRIBUTING.md: each is one file, dropped into a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import divergence_probe

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PLACES = {
    "dead_gradient.py": "rules/dead_gradient.py",
    "tinymeta_adapter.py": "observe/libraries/tinymeta.py",
    "tsv.py": "report/tsv.py",
    "sites.py": "commands/sites.py",
}

SCRIPT = """
import sys
import torch
from torch import nn
from tinymeta import Learner

class Net(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.first, self.last, self.shift = nn.Linear(3, 4), nn.Linear(4, 1), shift

    def forward(self, x):
        return self.last(torch.relu(self.first(x) + self.shift))

torch.manual_seed(0)
net = Net(float(sys.argv[1]))
for task in range(2):
    learner = Learner(net, lr=0.01)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    for step in range(3):
        learner.adapt(nn.functional.mse_loss(learner.module(x), y))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, the example files in their places, and a script."""
    folder = tmp_path_factory.mktemp("extended")
    package = Path(divergence_probe.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "divergence_probe", ignore=ignore)
    for name, place in PLACES.items():
        shutil.copy(EXAMPLES / name, folder / "divergence_probe" / place)
    shutil.copy(EXAMPLES / "tinymeta.py", folder)
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    return folder


def probe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "divergence_probe", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_rule_finds_its_fault_and_leaves_the_healthy_twin_alone(extended: Path) -> None:
    for shift, expected in (("-1000", ["EXAMPLE001"]), ("1", [])):
        out = probe(
            extended,
            "run",
            "--isolated",
            "--json",
            "r.json",
            "-o",
            f"rule{shift}",
            "script.py",
            shift,
        )
        report = json.loads((extended / "r.json").read_text(encoding="utf-8"))
        found = [f for f in report["findings"] if f["rule"] == "EXAMPLE001"]
        assert [f["rule"] for f in found] == expected, out.stderr
        for finding in found:
            assert finding["layer"] == "first" and finding["count"] == 2
            assert (finding["task"], finding["step"]) == (0, 1)


def test_rule_documents_itself(extended: Path) -> None:
    out = probe(extended, "rule", "dead-gradient")
    assert out.returncode == 0
    for title in ("What it does", "Why it is bad", "Example", "Use instead", "References"):
        assert f"## {title}" in out.stdout


def test_adapter_sees_tasks_and_steps(extended: Path) -> None:
    out = probe(
        extended, "run", "--isolated", "--json", "a.json", "-o", "adapter", "script.py", "1"
    )
    report = json.loads((extended / "a.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "healthy", out.stderr
    assert report["summary"]["adapters"] == ["tinymeta"]
    assert (report["summary"]["tasks"], report["summary"]["inner_steps"]) == (2, 6)
    steps = divergence_probe.load(extended / "adapter").steps()
    assert set(steps.parameter) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert (steps.update_norm > 0).any() and (steps.learning_rate == 0.01).all()


def test_format_is_found(extended: Path) -> None:
    out = probe(
        extended, "run", "--isolated", "--report", "tsv", "-o", "format", "script.py", "-1000"
    )
    lines = out.stderr.splitlines()
    assert "suspect" in lines
    assert any(line.startswith("warning\tEXAMPLE001\tfirst\t") for line in lines)


def test_command_is_found(extended: Path) -> None:
    assert "sites" in probe(extended, "--help").stdout
    probe(extended, "run", "--isolated", "-o", "command", "script.py", "1")
    out = probe(extended, "sites", "command")
    assert re.fullmatch(r" +6 .*script\.py:21\n", out.stdout), out


def test_contributing_shows_these_files_and_places() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, place in PLACES.items():
        assert f"docs/examples/{name}" in text and f"divergence_probe/{place}" in text
