"""Data flows one way: which part of the package may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import divergence_probe

PACKAGE = Path(divergence_probe.__file__).parent
NAME = "divergence_probe"

#: What a stage may import of the package besides itself.
PLAIN = {"errors", "thresholds", "version"}
MAY_IMPORT = {
    "observe": {"record", *PLAIN},
    "record": PLAIN,
    "rules": {"record", *PLAIN},
    "diagnosis": {"record", "rules", *PLAIN},
    "report": {"record", "rules", "diagnosis", *PLAIN},
}
#: Only these know torch: the observer, the demo's scripts, and the wiring, which notes its version.
KNOW_TORCH = ("observe/", "demo/", "probe.py")
HEAVY = ("torch", "pandas", "rich", "pyarrow", "numpy", "jinja2", "plotly")


def modules(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, *, typing_too: bool = True) -> set[str]:
    """Dotted names of everything ``path`` imports, wherever in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if (
            not typing_too
            and isinstance(node, ast.If)
            and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            skipped |= {id(child) for child in ast.walk(node)}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def parts_of_package(names: set[str]) -> set[str]:
    """First part below the package of each name: ``record``, ``rules``, ``errors``, ..."""
    below = {name.split(".")[1] for name in names if name.startswith(f"{NAME}.")}
    known = {p.stem if p.suffix == ".py" else p.name for p in PACKAGE.iterdir()}
    return below & known


@pytest.mark.parametrize("stage", MAY_IMPORT)
def test_a_stage_imports_only_what_stands_to_its_left(stage: str) -> None:
    found = {
        f"{path.relative_to(PACKAGE)} imports {part}"
        for path in modules(PACKAGE / stage)
        for part in parts_of_package(imports(path)) - MAY_IMPORT[stage] - {stage}
    }
    assert not found


def test_only_the_observer_imports_torch() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(n.split(".")[0] == "torch" for n in imports(path, typing_too=False))
    }
    assert found, "nothing imports torch: this test has lost its subject"
    assert {path for path in found if not path.startswith(KNOW_TORCH)} == set()


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        "def f():\n    from divergence_probe.report import html\n    import torch.nn\n",
        encoding="utf-8",
    )
    assert parts_of_package(imports(path)) == {"report"}
    assert "torch.nn" in imports(path)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.cli"])
def test_importing_is_light(name: str) -> None:
    assert loaded_by(f"import {name}") == set()


def test_help_is_light() -> None:
    assert loaded_by(f"from {NAME}.cli import main; main(['run', '--help'])") == set()


def test_a_heavy_import_is_seen() -> None:
    assert "numpy" in loaded_by(f"from {NAME}.record import schema")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after ``code``."""
    show = f"import sys; print('\\n', *(set(sys.modules) & set({HEAVY!r})))"
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    return set(out.stdout.splitlines()[-1].split())
