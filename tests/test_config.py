"""Settings of a project, and how the command line wins over them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import divergence_probe
from divergence_probe import attach
from divergence_probe.commands import options
from divergence_probe.config import Config, read_config
from divergence_probe.errors import UsageError
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.selection import Selection

from .command_line import probe, write_script

TOML = """
[tool.divergence_probe]
select = ["BN", "NG001"]
ignore = "BN002"
intent = ["reptile"]
fail-on = "warning"
[tool.divergence_probe.thresholds]
norm-growth = 5
"""

CFG = """
[divergence_probe]
select = BN, NG001
ignore = BN002
intent =
    reptile
fail_on = warning
thresholds = norm-growth=5
"""


def judged(*texts: str) -> options.Judgement:
    parser = argparse.ArgumentParser()
    options.add_judgement(parser)
    return options.judgement(parser.parse_args(texts))


@pytest.mark.parametrize(("name", "text"), [("pyproject.toml", TOML), ("setup.cfg", CFG)])
def test_both_files_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    config = read_config(tmp_path)
    assert config.source.startswith(name)
    assert (config.select, config.ignore) == (("BN", "NG001"), ("BN002",))
    assert (config.intent, config.fail_on) == (("reptile",), "warning")
    assert config.thresholds in (("norm-growth=5",), ("norm-growth=5.0",))
    monkeypatch.chdir(tmp_path)
    assert judged().selection.intent == ("reptile",)
    assert judged().thresholds == {"norm-growth": 5.0}
    given = judged(
        "--select", "MODE", "--fail-on", "never", "--threshold", "norm-growth=7", "--intent",
        "frozen,evaluation",
    )  # fmt: skip
    assert given.selection.select == ("MODE",)
    assert given.selection.ignore == ("BN002",)
    assert given.selection.intent == ("frozen", "evaluation")
    assert (given.fail_on, given.thresholds) == ("never", {"norm-growth": 7.0})
    assert judged("--isolated").selection.select == ()
    assert judged("--isolated").fail_on == "error"


def test_a_project_without_settings(tmp_path: Path) -> None:
    assert read_config(tmp_path) == Config()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = x\n")
    assert read_config(tmp_path) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selekt = []", r"no key 'selekt'. Did you mean 'select'\?"),
        ("select = 3", "select is 3; write a list"),
        ("fail-on = 'info'", "fail-on is 'info'; choose from"),
        ("thresholds = {norm-growth = 'x'}", "thresholds.norm-growth is 'x'"),
        ("select = [", "pyproject.toml cannot be read"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.divergence_probe]\n{text}\n")
    with pytest.raises(UsageError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tool = 3", r"tool is 3; write a table, \[tool.divergence_probe\]"),
        ("[tool]\ndivergence_probe = []", r"divergence_probe is \[\]; write a table"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(tmp_path)


def test_unknown_code_in_a_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.cfg").write_text("[divergence_probe]\nignore = ZZ\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"setup.cfg \[divergence_probe\]: ignore: No rule"):
        judged()


# -- layers: the same entry, wherever it is written ----------------------------------------------

FILES = {
    "pyproject.toml": '[tool.divergence_probe]\n{key} = ["{entry}", "MODE"]\n',
    "pyproject.toml as one text": '[tool.divergence_probe]\n{key} = "{entry}, MODE"\n',
    "setup.cfg": "[divergence_probe]\n{key} = {entry}, MODE\n",
    "setup.cfg over lines": "[divergence_probe]\n{key} =\n    {entry}\n    MODE\n",
}


def found(layer: str, rule: str = "BN003") -> Finding:
    return Finding(rule, "x", Severity.WARNING, "m", layer=layer)


def write_settings(folder: Path, kind: str, key: str, entry: str) -> str:
    name = kind.partition(" ")[0]
    (folder / name).write_text(FILES[kind].format(key=key, entry=entry), encoding="utf-8")
    return name


@pytest.mark.parametrize("kind", [*FILES, "command line", "Python"])
@pytest.mark.parametrize("key", ["select", "ignore"])
def test_layers_are_chosen_alike_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = "BN003:block[0-3].*"
    if kind == "command line":
        selection = judged(f"--{key}", f"{entry},MODE").selection
    elif kind == "Python":
        selection = attach(**{key: [entry, "MODE"]})._selection  # type: ignore[arg-type, assignment]
    else:
        write_settings(tmp_path, kind, key, entry)
        selection = judged().selection
    assert getattr(selection, key) == (entry, "MODE")
    for layer, matches in (("block2.norm", True), ("block4.norm", False), ("head", False)):
        assert selection.keeps(found(layer)) is (matches if key == "select" else not matches)
    assert selection.keeps(found("head", "MODE001")) is (key == "select")
    assert selection.keeps(found("block2.norm", "NG001")) is (key == "ignore")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("BN003:block[0.*", r"the \[ in the glob 'block\[0\.\*' is never closed"),
        ("BN003:", "'BN003:' names no layers"),
        ("BN9:block.*", "No rule starts with 'BN9'"),
    ],
)
def test_a_bad_entry_in_a_file_says_what_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, entry: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name = write_settings(tmp_path, kind, "ignore", entry)
    section = "tool.divergence_probe" if name == "pyproject.toml" else "divergence_probe"
    with pytest.raises(UsageError, match=rf"^{name} \[{section}\]: ignore: .*{message}"):
        judged()


def test_a_bad_entry_elsewhere_says_where() -> None:
    with pytest.raises(UsageError, match=r"^--select: 'BN003:' names no layers"):
        judged("--select", "BN003:")
    with pytest.raises(UsageError, match=r"^--intent: Unknown intent 'reptil'"):
        judged("--intent", "reptil")
    with pytest.raises(UsageError, match=r"^attach\(ignore=\.\.\.\): No rule starts with 'ZZ'"):
        attach(ignore=["ZZ"])
    with pytest.raises(UsageError, match=r"^select=: No rule starts with 'ZZ'"):
        divergence_probe.assert_no_divergence(lambda: None, select="ZZ")


def test_one_code_in_python_needs_no_list() -> None:
    assert attach(ignore="BN003", select="BN")._selection == Selection(("BN",), ("BN003",))


def test_layers_ignored_in_a_file_hold_in_a_run(tmp_path: Path) -> None:
    write_script(tmp_path, "for _ in loop(1e6): pass")
    settings = tmp_path / "pyproject.toml"
    for layers, code in (("2", 1), ("[02]", 0)):
        settings.write_text(
            f'[tool.divergence_probe]\nselect = ["NG"]\nignore = ["NG001:{layers}"]'
        )
        ended = probe(tmp_path, "run", "-o", "rec", "--force", "train.py")
        assert ended.returncode == code, ended.stderr
