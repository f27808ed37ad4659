"""``probe run``: the script is left alone, the exit code is the contract's, nothing is lost."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from divergence_probe.cli import main

from .command_line import (
    command,
    environment,
    interruptible,
    probe,
    redirected,
    strict_json,
    write_script,
)

FORMATS = ("concise", "json", "html", "junit", "sarif", "github", "markdown")


def test_healthy_script_is_left_alone_and_reported_in_every_format(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        """
        import os
        for _ in loop(0.01): pass
        print(sys.argv, __name__, sys.path[0] == os.path.dirname(os.path.abspath(__file__)))
        print(sys.modules["__main__"].__file__ == os.path.abspath(__file__), input())
        """,
    )
    reports = [f"--report={name}:out/report.{name}" for name in FORMATS]
    options = ["-o", "rec", "--report", "rich", *reports, "--json", "again.json"]
    ended = probe(tmp_path, "run", *options, script.name, "-o", "x", "--", "-m", input="typed\n")
    assert ended.stdout == "['train.py', '-o', 'x', '--', '-m'] __main__ True\nTrue typed\n"
    assert ended.returncode == 0, ended.stderr
    assert "HEALTHY" in ended.stderr and "train.py" in ended.stderr
    assert "\x1b" not in ended.stderr
    report = strict_json(tmp_path / "out" / "report.json")
    assert report == strict_json(tmp_path / "again.json")
    assert list(report) == [
        "schema_version", "tool", "script_exit", "exception", "verdict", "summary", "root_cause",
        "findings",
    ]  # fmt: skip
    assert (report["verdict"], report["script_exit"], report["exception"]) == ("healthy", 0, None)
    summary = report["summary"]
    assert (summary["tasks"], summary["inner_steps"], summary["adapters"]) == (2, 6, ["higher"])
    for name in FORMATS:
        assert (tmp_path / "out" / f"report.{name}").stat().st_size > 20
    assert strict_json(tmp_path / "rec" / "diagnosis.json")["verdict"] == "healthy"
    assert json.loads((tmp_path / "rec" / "findings.json").read_text()) == report["findings"]


def test_divergence_exits_with_1_and_the_recording_says_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_script(tmp_path, "for _ in loop(1e6): pass")
    ended = probe(tmp_path, "run", "--report", "concise", "train.py", env={"FORCE_COLOR": "1"})
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "diverged" in ended.stderr
    (folder,) = (tmp_path / ".probe").glob("*-train")
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(folder)]) == 1
    assert main(["check", str(folder), "--fail-on", "never"]) == 0
    assert capsys.readouterr().out.count("diverged") == 2
    assert main(["report", str(folder), "--report", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "diverged"
    assert main(["run", "-o", str(folder), "train.py"]) == 2
    assert "already holds a recording" in capsys.readouterr().err


def test_own_exit_code_wins_and_force_replaces(tmp_path: Path) -> None:
    write_script(tmp_path, "for _ in loop(1e6): pass\nsys.exit(3)")
    old = tmp_path / "rec" / "rank-1"
    old.mkdir(parents=True)
    (old.parent / "meta.json").write_text('{"schema_version": 1}')
    ended = probe(tmp_path, "run", "-o", "rec", "--force", "--json", "r.json", "train.py")
    assert ended.returncode == 3
    assert not old.exists()
    report = strict_json(tmp_path / "r.json")
    assert (report["script_exit"], report["verdict"]) == (3, "diverged")
    assert report["exception"] is None


def test_exception_in_an_inner_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write_script(
        tmp_path,
        """
        for task, step in loop(0.01):
            if step == 1:
                torch.zeros(2) @ torch.zeros(3)
        """,
    )
    ended = probe(tmp_path, "run", "-o", "rec", "--json", "r.json", script)
    assert ended.returncode == 1
    traceback, _, report = ended.stderr.partition("RuntimeError: ")
    assert "Traceback" in traceback and "divergence_probe" not in traceback
    assert "train.py" in report
    content = strict_json(tmp_path / "r.json")
    assert content["script_exit"] == 1
    assert content["exception"]["type"] == "RuntimeError"
    assert content["summary"]["inner_steps"] == 2
    # The same from the recording, without running anything.
    assert main(["report", str(tmp_path / "rec"), "--report", "json", "--isolated"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["exception"] == content["exception"]
    assert again["script_exit"] == 1
    assert main(["check", str(tmp_path / "rec"), "--isolated"]) == 1


def test_no_inner_loop_gives_5_with_advice(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import sys; print('ran', sys.argv[1:])")
    ended = probe(tmp_path, "run", "-o", "rec", "--report", "concise", "-m", "app", "-o", "x")
    assert (ended.returncode, ended.stdout) == (5, "ran ['-o', 'x']\n")
    assert "no inner loop" in ended.stderr and "probe run" in ended.stderr
    assert main(["check", str(tmp_path / "rec"), "--isolated"]) == 5


def test_a_failing_probe_gives_2_and_the_script_goes_on(tmp_path: Path) -> None:
    write_script(
        tmp_path,
        """
        from divergence_probe.record.writer import Writer
        def full(*_): raise OSError(28, "No space left on device")
        Writer.block = full
        for _ in loop(0.01): pass
        print("done")
        """,
    )
    ended = probe(tmp_path, "run", "-o", "rec", "train.py")
    assert (ended.returncode, ended.stdout) == (2, "done\n")
    assert "switched itself off" in ended.stderr and "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr


UNWRITABLE = {
    "full": ("2>/dev/full", "", 1e6),
    "closed": ("2>&-", "", 0.01),
    "a pipe nobody reads": ("2>&1 >/dev/null | true", "", 0.01),
    "closed by the script": ("", "import os; os.close(2)", 1e6),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_nobody_to_show_the_report_to_is_no_failure(tmp_path: Path, case: str) -> None:
    where, line, rate = UNWRITABLE[case]
    code = int(rate > 1)
    write_script(tmp_path, f"{line}\nfor _ in loop({rate}): pass")
    words = command("run", "-o", "rec", "--json", "r.json", "train.py")
    ended = redirected(tmp_path, words, where)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert strict_json(tmp_path / "r.json")["verdict"] == ("diverged" if code else "healthy")


def test_a_working_directory_that_is_removed_takes_no_report_with_it(tmp_path: Path) -> None:
    write_script(
        tmp_path,
        """
        import os
        for _ in loop(1e6): pass
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        """,
    )
    ended = probe(tmp_path, "run", "-o", "rec", "--json", "r.json", "train.py")
    assert ended.returncode == 1
    assert "DIVERGED   train.py" in ended.stderr and "failed" not in ended.stderr
    assert strict_json(tmp_path / "r.json")["verdict"] == "diverged"
    assert main(["check", str(tmp_path / "rec"), "--isolated"]) == 1


def test_a_script_whose_name_is_no_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"tr\xff\xc3\xa9.py")
    write_script(tmp_path, "for _ in loop(1e6): pass", name)
    reports = [f"--report={name}:report.{name}" for name in FORMATS]
    ended = probe(tmp_path, "run", *reports, name)
    assert ended.returncode == 1 and "switched itself off" not in ended.stderr
    assert all((tmp_path / f"report.{name}").exists() for name in FORMATS)
    (folder,) = (str(path) for path in (tmp_path / ".probe").glob("2*"))
    assert json.loads(Path(folder, "meta.json").read_text())["title"] == "tr\\udcff\u00e9.py"
    assert main(["check", folder]) == 1
    assert "tr\\udcff\u00e9.py:" in capsys.readouterr().out
    for table in ("steps", "tasks", "findings"):
        for ending in ("csv", "json", "parquet"):
            assert main(["export", folder, "--table", table, "-o", f"t.{ending}"]) == 0


@pytest.mark.parametrize("instead", ["", "os.mkdir('rec')"])
def test_a_recording_that_the_script_removes_is_said_once(tmp_path: Path, instead: str) -> None:
    write_script(
        tmp_path,
        f"""
        import os, shutil
        for _ in loop(0.01): pass
        shutil.rmtree("rec")
        {instead}
        for _ in loop(1e6, ways=5): pass  # of other shapes: names that were not written down yet
        """,
    )
    ended = probe(tmp_path, "run", "-o", "rec", "--confirm", "--json", "r.json", "train.py")
    assert ended.returncode == 1
    assert "DIVERGED" in ended.stderr and "switched itself off" not in ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("probe: ")]
    assert len(told) == 2 and "--confirm needs the recording" in told[0]
    assert "rec, was removed during the run" in told[1]
    assert "probe report rec" not in ended.stderr
    content = strict_json(tmp_path / "r.json")
    assert (content["verdict"], content["summary"]["tasks"]) == ("diverged", 4)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_worker_processes_do_not_record(tmp_path: Path, method: str) -> None:
    write_script(
        tmp_path,
        f"""
        import multiprocessing
        def work(lr):
            return sum(1 for _ in loop(lr)), __name__.strip("_")
        if __name__ == "__main__":
            torch.set_num_threads(1)
            for _ in loop(0.01): pass
            with multiprocessing.get_context("{method}").Pool(1) as pool:
                print(pool.map(work, [1e6])[0])
        """,
    )
    ended = probe(tmp_path, "run", "-o", "rec", "--json", "r.json", "train.py")
    name = "mp_main" if method == "spawn" else "main"
    assert (ended.returncode, ended.stdout) == (0, f"(6, '{name}')\n"), ended.stderr
    assert ended.stderr.count("HEALTHY") == 1
    assert strict_json(tmp_path / "r.json")["summary"]["tasks"] == 2


def _start(folder: Path, body: str) -> subprocess.Popen[str]:
    write_script(folder, body)
    process = subprocess.Popen(
        command("run", "-o", "rec", "--json", "r.json", "train.py"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,  # noqa: PLW1509
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


SLOW = """
import time
for number, _ in enumerate(loop(1e6, tasks=100000)):
    if number == 400: print("up", flush=True)
    if number > 400: time.sleep(0.01)
"""


def test_killed_run_can_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = _start(tmp_path, SLOW)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    recording = str(tmp_path / "rec")
    assert main(["report", recording, "--isolated"]) == 0
    shown = capsys.readouterr().out
    assert "DIVERGED" in shown and "killed" in shown
    assert main(["export", recording, "-o", str(tmp_path / "f.json"), "--table", "findings"]) == 0
    assert json.loads((tmp_path / "f.json").read_text())[0]["severity"] == "error"


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)", "os.abort()", "os._exit(0)"]
)
def test_a_run_whose_end_nobody_knows_is_no_green(
    tmp_path: Path, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_script(tmp_path, f"import os\nfor _ in loop(0.01): pass\n{end}")
    probe(tmp_path, "run", "-o", "rec", "train.py")
    recording = str(tmp_path / "rec")
    assert main(["check", recording, "--isolated"]) == 1
    assert "not known: it was killed, or is still running\n" in capsys.readouterr().out
    assert main(["check", recording, "--isolated", "--fail-on", "never"]) in (0, 5)


def test_a_run_killed_before_its_exit_code_was_written_is_no_green(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_script(tmp_path, "for _ in loop(0.01): pass\nsys.exit(3)")
    probe(tmp_path, "run", "-o", "rec", "train.py")
    recording = str(tmp_path / "rec")
    for fail_on in ("error", "never"):  # a script that failed counts, whatever counts besides
        assert main(["check", recording, "--isolated", "--fail-on", fail_on]) == 1
        assert "ended with exit code 3" in capsys.readouterr().out
    (tmp_path / "rec" / "diagnosis.json").unlink()
    assert main(["check", recording, "--isolated"]) == 1
    assert "not known" in capsys.readouterr().out


def test_interrupt_writes_the_report_and_gives_130(tmp_path: Path) -> None:
    process = _start(tmp_path, SLOW)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "DIVERGED" in err and "divergence_probe" not in err.partition("DIVERGED")[0]
    report = strict_json(tmp_path / "r.json")
    assert report["exception"]["type"] == "KeyboardInterrupt"
    assert report["exception"]["inner_loop"] is False
    assert report["script_exit"] == 130


def test_terminal_shows_progress_and_takes_it_away(tmp_path: Path) -> None:
    write_script(
        tmp_path,
        """
        import io, time
        for number, (task, step) in enumerate(loop(0.01, tasks=60)):
            if step == 2: time.sleep(0.04)  # a block is closed about once a second
            if step == 2 and task % 30 == 29: print("task", task)
        print(type(sys.stdout) is io.TextIOWrapper, sys.stdout is sys.__stdout__)
        """,
    )
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        command("run", "-o", "rec", "train.py"),
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        stdin=inner,
        stdout=inner,
        stderr=inner,
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            chunk = os.read(outer, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(20) == 0
    text = shown.decode()
    assert "probe: " in text and "inner steps" in text
    assert "True True" in text
    screen = _on_screen(text)
    assert "probe: " not in screen
    assert "task 29\n" in screen and "task 59\n" in screen
    assert "HEALTHY" in screen
    assert "\x1b[" in text.partition("HEALTHY")[0]  # a terminal gets colour


def _on_screen(text: str) -> str:
    """What a terminal shows in the end: carriage returns and erasures carried out, colours off."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        position = 0
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", line.replace("\r", "\x00")):
            if token == "\x00":
                position = 0
            elif token == "\x1b[K":
                del cells[position:]
            elif not token.startswith("\x1b"):
                cells[position : position + 1] = [token]
                position += 1
        lines.append("".join(cells))
    return "\n".join(lines)


USAGE = {
    "no such script": (["nothing.py"], r"nothing.py"),
    "nothing to run": ([], "name the script"),
    "unknown option": (["--frce", "s.py"], "Did you mean --force"),
    "unknown module": (["-m", "no_such_module"], "No module named"),
    "unknown code": (["--select", "ZZ9", "s.py"], "--select: .*'ZZ9'.*probe rule --all"),
    "unknown intent": (["--intent", "reptil", "s.py"], "Unknown intent 'reptil'"),
    "unknown threshold": (["--threshold", "norm-grwth=3", "s.py"], "Did you mean norm-growth"),
    "nan": (["--threshold", "norm-growth=nan", "s.py"], "norm-growth is nan; write a finite"),
    "no number": (["--threshold", "norm-growth=x", "s.py"], "NAME=VALUE"),
    "unknown format": (["--report", "htm", "s.py"], "Did you mean 'html'"),
    "json is a folder": (["--json", ".", "s.py"], "Cannot write.*folder"),
    "report below a file": (["--report", "html:s.py/x.html", "s.py"], "Cannot write"),
    "two to one file": (["--json", "a", "--report", "html:a", "s.py"], "Two reports go to"),
    "output below a file": (["-o", "s.py/rec", "s.py"], "Cannot write the recording"),
    "foreign meta.json": (["-o", "foreign", "--force", "s.py"], "replaces recordings only"),
    "fail-on": (["--fail-on", "info", "s.py"], "invalid choice: 'info'"),
    "timeout": (["--confirm-timeout", "3", "s.py"], "add --confirm"),
    "timeout in words": (
        ["--confirm", "--confirm-timeout", "x", "s.py"],
        "'x' is no number of sec",
    ),
    "json without a path": (["--json", "", "s.py"], "--json has an empty path"),
    "report without a path": (["--report", "json:", "s.py"], "'json:' has no path after the colon"),
    "timeout value": (["--confirm", "--confirm-timeout", "-3", "s.py"], "--confirm-timeout"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors_come_before_the_script(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.py").write_text("open('ran', 'w')")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "meta.json").write_text("{}")
    arguments, message = USAGE[name]
    assert main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "ran").exists()


def test_no_frame_of_ours_stands_in_the_scripts_traceback(tmp_path: Path) -> None:
    write_script(
        tmp_path,
        """
        from higher import innerloop_ctx
        net = torch.nn.Linear(2, 1)
        inner = torch.optim.SGD(net.parameters(), lr=0.1)
        with innerloop_ctx(net, inner) as (fast, steps):
            steps.step(fast(torch.ones(3, 2)).mean())
            try:
                steps.step(torch.ones(1))  # no graph
            except RuntimeError as error:
                raise ValueError("mine") from error
        """,
    )
    plain = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    ended = probe(tmp_path, "run", "-o", "rec", "train.py")
    assert plain.stderr.count("Traceback") == 2
    assert ended.returncode == plain.returncode == 1
    assert ended.stderr.startswith(plain.stderr)
