"""Formats are found, destinations read, and reports written whole or not at all."""

from __future__ import annotations

import io
import os
import types
from importlib import metadata
from pathlib import Path

import pytest

from divergence_probe.errors import ProbeError, UsageError
from divergence_probe.report import registry

from . import samples


def test_finds_the_formats_of_the_contract_with_the_default_first() -> None:
    contract = ["rich", "concise", "json", "html", "junit", "sarif", "github", "markdown"]
    assert sorted(registry.formats()) == sorted(contract)
    assert next(iter(registry.formats())) == "rich"


@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("report", registry.formats())
def test_every_format_takes_every_diagnosis(name: str, report: str) -> None:
    text = registry.render(report, samples.ALL[name](), width=80)
    assert text.endswith("\n")
    assert "\x1b" not in text and "\x00" not in text
    text.encode("utf-8")


def test_parse_destination() -> None:
    assert registry.parse_destination("json") == ("json", None)
    assert registry.parse_destination("html:out/a:b.html") == ("html", Path("out/a:b.html"))


def test_unknown_format_names_the_formats_and_the_closest() -> None:
    with pytest.raises(UsageError, match=r"'jsn'.*Did you mean 'json'\?.*sarif") as caught:
        registry.parse_destination("jsn:x")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="no path after the colon"):
        registry.parse_destination("json:")


def test_write_creates_parents_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "report.json"
    stream = io.StringIO()
    registry.write(samples.hostile(), [("json", path), ("concise", None)], stream)
    assert path.read_text().startswith("{")
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert "XX001" in stream.getvalue()


def test_write_replaces_and_keeps_the_mode_and_the_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    registry.write(samples.healthy(), [("json", link)], io.StringIO())
    assert link.is_symlink()
    assert real.read_text().startswith("{")
    assert real.stat().st_mode & 0o777 == 0o640


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ProbeError, match="No space left on device"):
        registry.write(samples.healthy(), [("json", path)], io.StringIO())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_file_is_said_and_the_others_are_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    good = tmp_path / "good.json"
    destinations = [("json", blocked / "x.json"), ("json", tmp_path), ("json", good)]
    with pytest.raises(ProbeError) as caught:
        registry.write(samples.healthy(), destinations, io.StringIO())
    assert str(blocked / "x.json") in str(caught.value)
    assert "it is a folder" in str(caught.value)
    assert good.exists()


def test_a_stream_that_cannot_be_written_takes_no_file_with_it(tmp_path: Path) -> None:
    path, closed = tmp_path / "report.json", io.StringIO()
    closed.close()
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    for stream in (full, closed, None):
        with pytest.raises(OSError, match=r"No space|closed"):
            registry.write(samples.healthy(), [("concise", None), ("json", path)], stream)
        assert path.read_text().startswith("{")
        path.unlink()
        with pytest.raises(ProbeError, match="it is a folder"):
            registry.write(samples.healthy(), [("rich", None), ("json", tmp_path)], stream)


class _AsciiStream(io.StringIO):
    encoding = "ascii"


@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("report", registry.formats())
def test_stream_that_only_takes_ascii(name: str, report: str) -> None:
    stream = _AsciiStream()
    registry.write(samples.ALL[name](), [(report, None)], stream, width=80)
    stream.getvalue().encode("ascii")


def test_ascii_keeps_the_columns() -> None:
    unicode, plain = io.StringIO(), io.StringIO()
    registry.write(samples.diverged(), [("rich", None)], unicode)
    registry.write(samples.diverged(), [("rich", None)], plain, ascii_only=True)
    plain.getvalue().encode("ascii")
    pairs = zip(unicode.getvalue().splitlines(), plain.getvalue().splitlines(), strict=True)
    assert all(len(one) == len(other) for one, other in pairs)
    assert "|w|" in plain.getvalue().replace("||", "|")


def _plugins(*points: metadata.EntryPoint) -> object:
    return lambda **_: metadata.EntryPoints(points)


def test_third_party_format_is_found_and_a_broken_one_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("haiku_report")
    module.__dict__.update(FORMAT="haiku", render=lambda diagnosis, **_: "five seven five\n")
    monkeypatch.setitem(__import__("sys").modules, "haiku_report", module)
    group = registry.ENTRY_POINTS
    points = [
        metadata.EntryPoint("haiku", "haiku_report", group),
        metadata.EntryPoint("broken", "no_such_module_at_all", group),
        metadata.EntryPoint("json", "haiku_report", group),
    ]
    monkeypatch.setattr(registry.metadata, "entry_points", _plugins(*points))
    found = registry.formats()
    assert "broken" not in found
    assert "'broken' left out" in capsys.readouterr().err
    assert registry.render("haiku", samples.healthy()) == "five seven five\n"
    assert registry.render("json", samples.healthy()).startswith("{")


def test_format_that_raises_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> str:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(registry.formats()["markdown"], "render", broken)
    good = tmp_path / "good.json"
    with pytest.raises(ProbeError, match="markdown report failed: ZeroDivisionError: oh"):
        registry.write(samples.healthy(), [("markdown", None), ("json", good)], io.StringIO())
    assert good.exists()
