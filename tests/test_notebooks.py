"""The notebooks run, and their verdicts are what their text says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
STORY = FOLDER / "01_from_symptom_to_fix.ipynb"


@pytest.fixture(scope="module")
def helper() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "execute.py"))


@pytest.fixture(scope="module")
def executed(helper: dict[str, Any]) -> nbformat.NotebookNode:
    pytest.importorskip("higher")
    return helper["execute"](STORY)


def shown(notebook: nbformat.NotebookNode, source: str) -> str:
    """Output of the code cell that contains ``source``: what is printed and what is displayed."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and source in c.source]
    assert len(cells) == 1, source
    texts = []
    for output in cells[0].outputs:
        data = output.get("data", {})
        texts.append(output.get("text", "") + data.get("text/html", data.get("text/plain", "")))
    return "".join(texts)


def test_the_symptom_is_there(executed: nbformat.NotebookNode) -> None:
    assert "loss nan, accuracy 0.20" in shown(executed, "def meta_test(")


def test_the_report_names_the_cause(executed: nbformat.NotebookNode) -> None:
    report = shown(executed, "as probe:")
    assert "<style" in report and "diverged" in report.lower()
    for said in ("stale-running-stats", "BN001", "net.train()"):
        assert said in report


def test_the_tables_show_what_the_text_says(executed: nbformat.NotebookNode) -> None:
    assert "NaN" in shown(executed, "conv1.pivot(")
    table = shown(executed, "batch_norm()")
    rows = re.findall(
        r"<th>(features\.norm\d)</th>\s*<td>([^<]*)</td>\s*<td>([^<]*)</td>\s*<td>([^<]*)", table
    )
    assert [row[0] for row in rows] == [f"features.norm{n}" for n in range(1, 5)]
    assert {tuple(map(float, row[1:])) for row in rows} == {
        (0, 0, 1)
    }  # training, batches, untrained


def test_the_fix_is_healthy(executed: nbformat.NotebookNode) -> None:
    report = shown(executed, "as fixed:")
    assert "healthy" in report.lower() and "BN005" in report and "BN001" not in report
    assert shown(executed, "as other:").splitlines()[-1].startswith("healthy")


def test_the_assertion_explains(executed: nbformat.NotebookNode) -> None:
    assert "inner loops: diverged" in shown(executed, "except AssertionError")


def test_stored_outputs_are_of_this_notebook(
    executed: nbformat.NotebookNode, helper: dict[str, Any]
) -> None:
    """Complete, in order, with the same verdicts, and free of paths of the machine that ran it."""
    stored = nbformat.read(STORY, as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for source in ("as probe:", "as fixed:", "as other:"):
        verdicts = [
            re.findall(r"diverged|healthy|suspect", shown(notebook, source), re.I)[0].lower()
            for notebook in (stored, executed)
        ]
        assert verdicts[0] == verdicts[1]
    text = STORY.read_text(encoding="utf-8")
    assert not re.search(r"ipykernel_\d|/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\", text)
    assert str(FOLDER.parent) not in text


def test_paths_are_taken_out(helper: dict[str, Any]) -> None:
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=3)
    from ipykernel.compiler import get_file_name

    where = get_file_name("1 + 1")
    cell.outputs = [nbformat.v4.new_output("stream", text=f"at {where}:1 and {FOLDER}/x.py")]
    notebook = helper["without_paths"](nbformat.v4.new_notebook(cells=[cell]))
    assert notebook.cells[0].outputs[0].text == "at In[3]:1 and notebooks/x.py"
