"""The terminal report: order of answers, width, colour, and nothing of the user's is markup."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from divergence_probe.diagnosis.diagnosis import Diagnosis, NormTrace, Summary
from divergence_probe.report import registry, terminal
from divergence_probe.rules.finding import Finding, Mark, Severity

from . import samples


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("color", [False, True])
def test_no_line_is_longer_than_the_width(name: str, width: int, color: bool) -> None:
    console = Console(width=width, color_system=None)
    text = terminal.render(samples.ALL[name](), width=width, color=color)
    lines = [line.plain for line in console.render_str(text, markup=False).split("\n")]
    if color:
        from rich.text import Text

        lines = [Text.from_ansi(line).plain for line in text.splitlines()]
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("name", samples.ALL)
def test_plain_text_has_no_control_characters(name: str) -> None:
    text = terminal.render(samples.ALL[name](), color=False)
    assert not [c for c in text if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0]
    assert "\u202e" not in text
    text.encode("utf-8")


def test_colour_carries_nothing_that_the_text_does_not() -> None:
    from rich.text import Text

    coloured = terminal.render(samples.diverged(), color=True)
    assert "\x1b[" in coloured
    plain = "\n".join(Text.from_ansi(line).plain.rstrip() for line in coloured.splitlines())
    assert plain == terminal.render(samples.diverged()).rstrip("\n")


def test_answers_come_in_order(tmp_path: Path) -> None:
    script = tmp_path / "eval.py"
    script.write_text(samples.SCRIPT)
    text = terminal.render(samples.diverged(str(script)))
    landmarks = (
        "DIVERGED   10 tasks", "Why   Eval-mode", "net.eval()", "╰─ eval mode from here on",
        "diffopt.step(", "╰─ conv1.weight", "╰─ confirmed", "Fix   net.train()", "re-run with",
        "Norm ‖w‖", "BatchNorm  running", "Findings", "Incomplete", "Saved", "Next",
    )  # fmt: skip
    places = [text.find(landmark) for landmark in landmarks]
    assert -1 not in places
    assert places == sorted(places)


def test_frame_shows_the_function_and_the_loop_around_a_mark(tmp_path: Path) -> None:
    script = tmp_path / "eval.py"
    script.write_text(samples.SCRIPT)
    lines = terminal.render(samples.diverged(str(script))).splitlines()
    numbered = [line.split("│")[0].strip() for line in lines if "│" in line]
    assert [number for number in numbered if number] == ["4", "5", "9", "10"]


def test_unreadable_file_still_shows_place_and_text() -> None:
    text = terminal.render(samples.diverged("/nowhere/eval.py"))
    assert "/nowhere/eval.py:5: eval mode from here on" in text


def test_marks_of_two_files_stand_in_two_frames(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\ny = 2\n")
    marks = (
        Mark(f"{tmp_path}/a.py:2", "second"),
        Mark(f"{tmp_path}/b.py:1", "other"),
        Mark(f"{tmp_path}/a.py:1", "first"),
    )
    finding = Finding("X1", "x", Severity.WARNING, "m", marks=marks)
    diagnosis = Diagnosis("suspect", Summary(1, 1), findings=(finding,))
    text = terminal.render(diagnosis, width=120)
    assert text.count("╭─") == 2
    assert text.index("╰─ first") < text.index("╰─ second") < text.index("╰─ other")


def test_norm_table_leads_with_what_broke_and_says_what_it_leaves_out() -> None:
    text = terminal.render(samples.diverged(), width=120)
    table = text[text.index("Norm ‖w‖") :].splitlines()
    assert table[2].split()[0] == "classifier.weight"
    assert table[3].split()[:2] == ["features.conv1.weight", "9.5937"]
    assert "×5.7e12" in table[3] and "█" in table[3]
    assert "and 11 more" in text
    assert "first to grow: features.conv1.weight at step 1" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_every_number_of_the_norm_table_is_whole(width: int) -> None:
    traces = tuple(
        NormTrace(f"layer.{'x' * i}.w", i, tuple(1e-5 * 10.0**j for j in range(40)))
        for i in range(9)
    )
    text = terminal.render(Diagnosis("diverged", Summary(1, 40), norms=traces), width=width)
    rows = [line for line in text.splitlines() if "1.0e-5" in line]
    assert len(rows) == 8
    assert all("1.0e34  ×1.0e39" in row for row in rows)


def test_healthy_run_fits_a_screen_and_shows_the_evidence() -> None:
    text = terminal.render(samples.healthy())
    assert len(text.splitlines()) <= 40
    for evidence in ("×1.04", "0.35 of 2", "0.12 σ", "1.61 → 0.42", "4 with BatchNorm"):
        assert evidence in text


def test_unobserved_run_gives_advice() -> None:
    text = terminal.render(samples.unobserved())
    assert "No inner step was seen" in text
    assert "Try" in text and "attach" in text


@pytest.mark.parametrize("name", ["diverged", "unobserved", "hostile"])
def test_incomplete_is_said_in_every_verdict(name: str) -> None:
    assert "Incomplete" in terminal.render(samples.ALL[name]())


def test_exception_inside_an_inner_loop_comes_first() -> None:
    for report in ("rich", "markdown", "html"):
        text = registry.render(report, samples.suspect())
        assert 0 < text.index("RuntimeError") < text.index("relative update"), report


def test_markup_is_shown_as_it_is() -> None:
    text = terminal.render(samples.hostile(), width=120)
    assert "[bold red]x[/]" in text
    assert r"\x1b[31m\x07\x00\u202e" in text


def test_renderable_takes_the_width_of_its_console() -> None:
    for width in (60, 100):
        stream = io.StringIO()
        Console(width=width, color_system=None, file=stream).print(
            terminal.renderable(samples.diverged())
        )
        printed = stream.getvalue()
        longest = max(cell_len(line.rstrip()) for line in printed.splitlines())
        assert width - 20 < longest <= width


def test_nonfinite_norms_are_written_out() -> None:
    trace = NormTrace("w", 0, (1.0, math.inf, math.nan))
    text = terminal.render(Diagnosis("diverged", Summary(1, 2), norms=(trace,)))
    row = next(line for line in text.splitlines() if line.strip().startswith("w "))
    assert row.split() == ["w", "1.0000", "inf", "nan", "nan", "▁█×"]


def test_code_of_a_fix_stays_code_in_a_narrow_terminal() -> None:
    cause = samples.diverged().root_cause
    assert cause is not None
    fix = "    net.train()  # batch statistics, as in meta-training\n# or: nn.GroupNorm(8, 64)"
    told = replace(samples.diverged(), root_cause=replace(cause, fix=fix))
    text = terminal.render(told, width=40)
    block = text[text.index(" Fix ") : text.index(" Cause")].splitlines()
    lines = [line[7:].rstrip() for line in block if line.strip()]
    assert lines == [
        "    # batch statistics, as in",
        "    # meta-training",
        "    net.train()",
        "# or: nn.GroupNorm(8, 64)",
    ]


def test_the_rule_to_read_up_on_is_the_one_that_leads_to_the_cause() -> None:
    told = samples.diverged()
    cause = told.root_cause
    assert cause is not None and len(told.findings) > 1
    last = len(told.findings) - 1
    text = terminal.render(replace(told, root_cause=replace(cause, findings=(last,))))
    assert f"probe rule {told.findings[last].rule}" in text


def test_a_scripts_own_exit_code_is_told() -> None:
    told = replace(samples.healthy(), script_exit=3)
    assert "exit code 3" in terminal.render(told)
    assert "exit code" not in terminal.render(samples.healthy())


def test_a_run_that_was_not_watched_to_its_end_is_not_said_to_have_had_no_steps() -> None:
    told = replace(samples.healthy(), verdict="unobserved")
    text = terminal.render(told)
    assert "not watched to its end" in text
    assert "No inner step was seen" not in text and " Try " not in text
