"""Settings of a project, and how the command line wins over them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from divergence_probe.commands import options
from divergence_probe.config import Config, read_config
from divergence_probe.errors import UsageError

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


def test_unknown_code_in_a_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.cfg").write_text("[divergence_probe]\nignore = ZZ\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"setup.cfg \[divergence_probe\]: No rule"):
        judged()
