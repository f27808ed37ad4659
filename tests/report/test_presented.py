"""A presented diagnosis shows itself in a terminal, a notebook, as text and as a dict."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from divergence_probe.report import json_report, terminal
from divergence_probe.report.presented import PresentedDiagnosis

from . import samples


@pytest.mark.parametrize("name", samples.ALL)
def test_forms(name: str) -> None:
    plain = samples.ALL[name]()
    shown = PresentedDiagnosis.of(plain)
    assert str(shown) == terminal.render(plain)
    assert shown.to_dict() == json_report.to_dict(plain)
    assert "<main" in shown._repr_html_()
    assert PresentedDiagnosis.of(shown) is shown


def test_same_data_copied_and_immutable() -> None:
    plain = samples.diverged()
    shown = PresentedDiagnosis.of(plain)
    assert shown.findings is plain.findings
    assert copy.copy(shown) == shown
    calm = PresentedDiagnosis.of(samples.healthy())  # nan is not equal to itself
    assert pickle.loads(pickle.dumps(calm)) == calm
    with pytest.raises(AttributeError):
        shown.verdict = "healthy"  # type: ignore[misc]


def test_rich_prints_the_report() -> None:
    stream = io.StringIO()
    Console(file=stream, width=72, color_system=None).print(
        PresentedDiagnosis.of(samples.hostile())
    )
    assert "[bold red]x[/]" in stream.getvalue()


def test_importing_it_and_the_registry_brings_neither_rich_nor_jinja_nor_torch() -> None:
    code = (
        "import sys, divergence_probe.report.presented\n"
        "import divergence_probe.report.registry as r\n"
        "r.formats(); print({'rich', 'jinja2', 'torch', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "set()"


def test_printing_takes_no_random_number_of_the_programs():
    """rich draws one as it is imported, which a process does once: so in one of its own."""
    program = (
        "import random; random.seed(0); before = random.getstate()\n"
        "from tests.report import samples\n"
        "from divergence_probe.report import registry\n"
        "from divergence_probe.report import terminal; terminal.render(samples.ALL['healthy']())\n"
        "for name in registry.formats(): registry.render(name, samples.ALL['healthy']())\n"
        "assert random.getstate() == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
