"""Run the notebooks of this folder and store their outputs, free of this machine's paths.

    python notebooks/execute.py

A cell's code lives in a temporary file that is named after the process and the cell's text; stored
outputs say ``In[3]`` for it instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
_LONGEST_TWIN = 2000  # characters
_CELL_FILE = re.compile(r"[\w./\\:~-]*ipykernel_\d+[/\\](\d+)\.py")


def execute(path: Path, timeout: int = 120) -> nbformat.NotebookNode:
    """The notebook at ``path`` with its outputs, as a fresh kernel gives them.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def without_paths(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """``notebook`` with cell files named ``In[n]`` and no file of this machine in its outputs."""
    names = _cell_names(notebook)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = _replaced(_merged(cell["outputs"]), names)
    return notebook


def _merged(outputs: list[Any]) -> list[Any]:
    """One output for what was printed in pieces; no text twin of a whole HTML report."""
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" and output.get("name") == last.get("name"):
            last["text"] += output["text"]
            continue
        data = output.get("data", {})
        if "text/html" in data and len(data.get("text/plain", "")) > _LONGEST_TWIN:
            del data["text/plain"]
        merged.append(output)
    return merged


def _cell_names(notebook: nbformat.NotebookNode) -> dict[str, str]:
    from ipykernel.compiler import get_tmp_hash_seed, murmur2_x86

    return {
        str(murmur2_x86(cell.source, get_tmp_hash_seed())): f"In[{cell.execution_count}]"
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def _replaced(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        value = value.replace(f"{FOLDER.parent}/", "")
        return _CELL_FILE.sub(lambda found: names.get(found[1], "In[?]"), value)
    if isinstance(value, list):
        return [_replaced(item, names) for item in value]
    if isinstance(value, dict):
        return nbformat.from_dict({key: _replaced(item, names) for key, item in value.items()})
    return value


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(without_paths(execute(path)), path)
        print(path.name)
