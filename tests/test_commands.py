"""The commands that run nothing: help, rule, report, check, export; and the demo."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import types
from importlib import metadata
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from divergence_probe import attach, diagnose
from divergence_probe.cli import main
from divergence_probe.commands import registry
from divergence_probe.commands.base import Command
from divergence_probe.commands.run import Run, split_options
from divergence_probe.rules.registry import all_rules

from .command_line import command as command_line
from .command_line import environment, probe, redirected

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task that diverges."""
    from .test_testing import adapt

    folder = tmp_path_factory.mktemp("recordings") / "diverging"
    with attach(output=folder):
        adapt(1e6)
    return folder


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, divergence_probe.cli as c; c.main(['--help']); c.main(['run', '--help'])\n"
        "print({'torch', 'numpy', 'pandas', 'pyarrow', 'rich', 'jinja2'} & set(sys.modules))"
    )
    times = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        started = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
        )
        times.append(time.perf_counter() - started)
    assert ended.stdout.endswith("set()\n")
    assert "Watch a small MAML" in ended.stdout and "norm-growth" in ended.stdout
    assert min(times) < 0.5


def test_version_and_unknown_command(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("divergence-probe 0.")
    assert main([]) == 2
    assert "usage: probe" in capsys.readouterr().err
    assert main(["rnu"]) == 2
    assert "Did you mean `probe run`?" in capsys.readouterr().err
    assert main(["train.py"]) == 2
    assert "`probe run train.py`" in capsys.readouterr().err
    assert main(["--frob"]) == 2
    assert "no option --frob" in capsys.readouterr().err


def test_every_command_has_help(capsys: Captured) -> None:
    for name, command in registry.all_commands().items():
        assert command.summary().endswith((".", "up."))
        assert main([name, "--help"]) == 0
        assert command.summary()[:40] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "code", "told"),
    [
        (">/dev/full", 2, "Cannot write to standard output: No space left"),
        (">&-", 2, "Standard output is closed"),
        ("| true", 141, ""),
    ],
)
def test_output_that_cannot_be_written_is_said(
    recording: Path, tmp_path: Path, where: str, code: int, told: str
) -> None:
    for arguments in (["check", recording], ["rule", "--all"], ["--version"]):
        ended = redirected(tmp_path, command_line(*arguments), where)
        assert ended.returncode == code
        assert told in ended.stderr and "Traceback" not in ended.stderr
        assert ended.stderr.count("\n") == bool(told)


def test_reports_go_to_files_where_stdout_is_closed(recording: Path, tmp_path: Path) -> None:
    words = shlex.join(command_line("report", recording, "--json", "r.json"))
    ended = subprocess.run(f"{words} >&-", shell=True, cwd=tmp_path, env=environment())
    assert ended.returncode == 2
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "diverged"


def test_a_working_directory_that_is_gone_is_said(
    recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["check", str(recording)]) == 2
    assert "directory has been removed" in capsys.readouterr().err


def test_a_fault_of_the_probe_is_no_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def broken(*_: object) -> int:
        raise KeyError("no such thing")

    monkeypatch.setattr(Run, "run", broken)
    monkeypatch.delenv("DIVERGENCE_PROBE_TRACEBACK", raising=False)
    assert main(["run", "train.py"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("probe: KeyError: 'no such thing' (test_commands.py, line ")
    assert "please report it" in told and "Traceback" not in told
    monkeypatch.setenv("DIVERGENCE_PROBE_TRACEBACK", "1")
    assert main(["run", "train.py"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_third_party_command_is_found_and_a_broken_one_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    class Hello(Command):
        """Say hello."""

        name = "hello"

        def run(self, arguments: object) -> int:
            print("hello")
            return 0

    module = types.ModuleType("hello_command")
    module.__dict__["Hello"] = Hello
    monkeypatch.setitem(sys.modules, "hello_command", module)
    points = metadata.EntryPoints(
        [
            metadata.EntryPoint("hello", "hello_command:Hello", registry.ENTRY_POINTS),
            metadata.EntryPoint("broken", "no_such_module_at_all", registry.ENTRY_POINTS),
            metadata.EntryPoint("run", "hello_command:Hello", registry.ENTRY_POINTS),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry.all_commands.cache_clear()
    try:
        assert main(["hello"]) == 0
        captured = capsys.readouterr()
        assert captured.out == "hello\n"
        assert "'broken' left out" in captured.err
        assert registry.all_commands()["run"] is Run
    finally:
        registry.all_commands.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        (["s.py", "-o", "x"], 0),
        (["-o", "d", "--force", "s.py", "--", "-m"], 3),
        (["-od", "--report=json:x", "s.py"], 2),
        (["--json", "x", "-m", "mod", "-o", "y"], 4),
        (["-mmod", "-o", "y"], 1),
        (["--confirm", "--select", "A", "s.py", "--select", "B"], 3),
        (["-", "x"], 0),
        (["--unknown", "s.py"], 1),
    ],
)
def test_options_end_where_the_script_begins(arguments: list[str], own: int) -> None:
    parser = Run().parser()
    assert split_options(parser, arguments) == (arguments[:own], arguments[own:])
    separated = [*arguments[:own], "--", *arguments[own:]]
    if "-m" not in arguments and "-mmod" not in arguments:
        assert split_options(parser, separated) == (arguments[:own], arguments[own:])


def test_rule_explains_by_code_and_by_name(capsys: Captured) -> None:
    assert main(["rule", "bn001", "norm-explosion"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# eval-with-untrained-running-stats (BN001)\n\nerror · cause")
    sections = ["What it does", "Why it is bad", "Example", "Use instead", "References"]
    for document in text.split("\n# ")[:2]:
        positions = [document.index(f"## {title}") for title in sections]
        assert positions == sorted(positions)
    assert "\x1b" not in text


def test_rule_all_documents_every_rule(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["rule", "--all"]) == 0
    text = capsys.readouterr().out
    for rule in all_rules():
        assert f"| {rule.code} | {rule.name} |" in text
        assert f"# {rule.name} ({rule.code})" in text
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["rule", "BN001"]) == 0
    assert "\x1b[" in capsys.readouterr().out


def test_rule_unknown_names_the_closest(capsys: Captured) -> None:
    assert main(["rule", "BN01"]) == 2
    assert "Did you mean BN001" in capsys.readouterr().err
    assert main(["rule"]) == 2
    assert "--all" in capsys.readouterr().err


def test_a_recording_from_before_there_was_some_column_is_read(
    recording: Path, tmp_path: Path, capsys: Captured
) -> None:
    older = tmp_path / "older"
    shutil.copytree(recording, older)
    steps = older / "rank-0" / "steps.arrow"
    table = pa.ipc.open_stream(steps.read_bytes()).read_all()
    table = table.drop_columns(["query_gradient", "step_rate", "bn_drift"])
    with pa.ipc.new_stream(steps, table.schema) as sink:
        sink.write_table(table)

    assert main(["report", str(older), "--isolated"]) == 0
    assert "DIVERGED" in capsys.readouterr().out


def damaged(recording: Path, folder: Path, name: str, content: object = None) -> str:
    """A copy with one file of other content, or with none of it; ``meta.json`` is only changed."""
    copy = folder / "damaged"
    shutil.copytree(recording, copy)
    path = copy / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    elif isinstance(content, int):
        os.truncate(path, path.stat().st_size + content)
    else:
        path.unlink()
    return str(copy)


@pytest.mark.parametrize("name", ["rank-0/steps.arrow", "rank-0/events.arrow"])
@pytest.mark.parametrize("content", [None, b"", b"hello world" * 100, -8, -100])
def test_a_complete_recording_that_lost_steps_is_not_judged_as_a_whole_one(
    recording: Path, tmp_path: Path, name: str, content: object, capsys: Captured
) -> None:
    path = damaged(recording, tmp_path, name, content)

    for fail_on in ("error", "never"):
        assert main(["check", path, "--fail-on", fail_on, "--isolated"]) == 2
        told = capsys.readouterr().err
        assert f"{path}/{name} is " in told and "record the run again" in told
    assert main(["report", path, "--report", "concise", "--isolated"]) == 0
    assert f"incomplete: {path}/{name} is " in capsys.readouterr().out
    assert main(["export", path, "-o", str(tmp_path / "steps.csv")]) == 0
    assert f"{path}/{name} is " in capsys.readouterr().err


META = {
    "no version": {"schema_version": None},
    "version in words": {"schema_version": "one"},
    "no layouts": {"layouts": []},
    "layouts lost": {"layouts": None},
    "odd layouts": {"layouts": [{}]},
    "a list": b"[1]",
    "half of it": b'{"schema_version": 1',
}


@pytest.mark.parametrize("name", META)
def test_a_damaged_meta_file_is_named(
    recording: Path, tmp_path: Path, name: str, capsys: Captured
) -> None:
    path = damaged(recording, tmp_path, "meta.json", META[name])

    for command in (["check"], ["report"], ["export", "-o", str(tmp_path / "steps.csv")]):
        assert main([command[0], path, *command[1:]]) == 2
        assert f"{path}/meta.json is damaged" in capsys.readouterr().err


def test_other_damage_is_named(recording: Path, tmp_path: Path, capsys: Captured) -> None:
    for number, (name, content) in enumerate(
        [
            ("meta.json", {"judgement": None}),
            ("meta.json", {"seconds": "long"}),
            ("diagnosis.json", b"{"),
            ("diagnosis.json", b'{"script_exit": null}'),
        ]
    ):
        path = damaged(recording, tmp_path / str(number), name, content)
        assert main(["check", path, "--isolated"]) == 2
        assert f"{path}/{name} is damaged" in capsys.readouterr().err
    for number, content in enumerate([b"{", b'{"a": 1}', b"[1]"]):
        path = damaged(recording, tmp_path / f"findings-{number}", "findings.json", content)
        target = str(tmp_path / "findings.csv")
        assert main(["export", path, "--table", "findings", "-o", target]) == 2
        assert f"{path}/findings.json is damaged" in capsys.readouterr().err


def test_a_report_knows_how_long_the_run_was_watched(recording: Path) -> None:
    seconds = json.loads((recording / "meta.json").read_text())["seconds"]
    assert diagnose(recording).summary.seconds == seconds > 0


def test_report_and_check_honour_the_selection(recording: Path, capsys: Captured) -> None:
    path = str(recording)
    assert main(["report", path, "--isolated"]) == 0
    assert "DIVERGED" in capsys.readouterr().out
    assert main(["report", path, "--report", "json", "--select", "MODE", "--isolated"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    assert main(["check", path, "--isolated"]) == 1
    assert main(["check", path, "--select", "MODE", "--isolated"]) == 0
    assert main(["check", str(recording.parent), "--isolated"]) == 2
    assert "holds no recording" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["steps", "batch_norm", "tasks", "findings"])
def test_export_in_three_formats(
    recording: Path, tmp_path: Path, table: str, capsys: Captured
) -> None:
    lengths = set()
    for ending, read in ((".csv", pd.read_csv), (".parquet", pd.read_parquet)):
        target = tmp_path / f"t{ending}"
        assert main(["export", str(recording), "-o", str(target), "--table", table]) == 0
        if table != "batch_norm":  # the net has none
            lengths.add(len(read(target)))
    target = tmp_path / "t.json"
    assert main(["export", str(recording), "-o", str(target), "--table", table]) == 0
    rows = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert lengths <= {len(rows)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.json", "t.parquet"]


def test_export_says_what_it_cannot_write(recording: Path, capsys: Captured) -> None:
    for target, message in (("t.xlsx", ".parquet"), (f"{recording}/meta.json/t.csv", "Cannot")):
        assert main(["export", str(recording), "-o", target]) == 2
        assert message in capsys.readouterr().err


def test_demo_without_its_library_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert main(["demo"]) == 2
    assert "pip install higher" in capsys.readouterr().err


def test_demo_shows_the_fault_and_its_healthy_twin(tmp_path: Path) -> None:
    ended = probe(tmp_path, "demo")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.index("DIVERGED") < ended.stderr.index("HEALTHY")
    assert "stale-running-stats" in ended.stderr
    assert "eval_acc" in ended.stdout
