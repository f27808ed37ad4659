"""A line is the user's: never that of a library, wherever that was installed."""

from __future__ import annotations

import sys
import types

import pytest

from divergence_probe.observe.callsite import CallSites


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a library's name, outside of any site-packages."""

    def make(name: str, installed: bool):
        folder = tmp_path / "checkout"
        (folder / name).mkdir(parents=True)
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name)]
        monkeypatch.setitem(sys.modules, name, module)
        if installed:
            facts = folder / f"{name}-9.0.dist-info"
            facts.mkdir()
            (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
            monkeypatch.syspath_prepend(str(folder))
        return str(folder / name / "code.py")

    return make


def called_from(filename: str) -> str | None:
    """The site of a call that a function of ``filename`` makes for this one."""
    sites = CallSites()
    namespace = {"sites": sites}
    exec(compile("def call(): return sites.here()\n", filename, "exec"), namespace)
    return sites.name(namespace["call"]())


@pytest.mark.parametrize("installed", [True, False])
def test_a_library_in_an_unusual_place(package, installed):
    """Installed there (``pip install --target`` or ``-e``); a package of the user's own is not."""
    filename = package("torchmeta", installed)

    site = called_from(filename)

    assert (site == f"{filename}:1") == (not installed)
    assert site is not None and (installed == ("test_callsite.py" in site))
