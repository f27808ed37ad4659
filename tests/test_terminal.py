"""When to colour, how wide, and a progress line that gives way."""

from __future__ import annotations

import io
import sys

import pytest

from divergence_probe.diagnosis.analysis import Analysis
from divergence_probe.progress import ProgressLine
from divergence_probe.terminal import wants_color, width_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "on_terminal", "elsewhere"),
    [
        ({"TERM": "xterm"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
        ({"TERM": "xterm", "FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
        ({"TERM": "xterm", "FORCE_COLOR": "0"}, True, False),
    ],
)
def test_color(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    on_terminal: bool,
    elsewhere: bool,
) -> None:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_color(Terminal()) is on_terminal
    assert wants_color(io.StringIO()) is elsewhere
    assert wants_color(sys.__stderr__) in (True, False)


def test_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "123")
    assert width_of(io.StringIO()) == 123
    monkeypatch.setenv("COLUMNS", "wide")
    assert width_of(io.StringIO()) == width_of(Terminal()) == 80


def test_the_line_gives_way_to_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    line = ProgressLine(out, err)
    line.start()
    line.update(Analysis())
    assert err.getvalue().startswith("\rprobe: 0 tasks") and err.getvalue().endswith("\x1b[K\r")
    line.update(Analysis())  # too soon
    assert err.getvalue().count("probe: ") == 1
    print("half a line", end="", file=out)
    assert err.getvalue().endswith("\r\x1b[K")
    monkeypatch.setattr("divergence_probe.progress._SECONDS_BETWEEN", 0)
    line.update(Analysis())  # would overwrite what the script has begun
    assert err.getvalue().count("probe: ") == 1
    print(" and the rest", file=out)
    line.update(Analysis())
    assert err.getvalue().count("probe: ") == 2
    line.close()
    line.update(Analysis())
    assert err.getvalue().count("probe: ") == 2
    assert out.getvalue() == "half a line and the rest\n"
    assert "write" not in vars(out) and "write" not in vars(err)


def test_no_line_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    err = io.StringIO()
    line = ProgressLine(Terminal(), err)
    line.start()
    line.update(Analysis())
    line.close()
    assert err.getvalue() == ""
