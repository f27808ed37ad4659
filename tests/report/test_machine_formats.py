"""The formats that other programs read: strict JSON, well-formed XML, SARIF, workflow commands."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from divergence_probe.diagnosis.diagnosis import Diagnosis, Summary
from divergence_probe.report import concise, github, json_report, junit, markdown, sarif
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.growth import NormExplosion

from . import samples


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", samples.ALL)
def test_json_is_strict_and_complete(name: str) -> None:
    diagnosis = samples.ALL[name]()
    report = _strict(json_report.render(diagnosis))
    assert report == json_report.to_dict(diagnosis)
    assert list(report) == [
        "schema_version", "tool", "script_exit", "exception", "verdict", "summary",
        "root_cause", "findings", *(["interventions"] if diagnosis.interventions else []),
    ]  # fmt: skip
    assert list(report["summary"]) == [
        "tasks", "inner_steps", "layers", "adapters", "overhead_fraction", "ranks",
    ]  # fmt: skip
    for finding in report["findings"]:
        assert list(finding) == [
            "rule", "name", "cause", "severity", "layer", "task", "step", "phase", "rank",
            "count", "message", "evidence", "fix",
        ]  # fmt: skip


def test_json_writes_nonfinite_numbers_as_strings() -> None:
    evidence = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": "text", "f": 3}
    finding = Finding("X1", "x", Severity.INFO, "m", evidence=evidence)
    report = _strict(json_report.render(Diagnosis("healthy", Summary(), findings=(finding,))))
    expected = {"a": "nan", "b": "inf", "c": "-inf", "d": 1.5, "e": "text", "f": 3}
    assert report["findings"][0]["evidence"] == expected


def test_json_takes_numpy_scalars() -> None:
    numpy = pytest.importorskip("numpy")
    evidence = {"a": numpy.float32("nan"), "b": numpy.int64(3), "c": numpy.float64(0.5)}
    finding = Finding("X1", "x", Severity.INFO, "m", step=numpy.int64(2), evidence=evidence)
    report = _strict(json_report.render(Diagnosis("healthy", Summary(), findings=(finding,))))
    assert report["findings"][0]["evidence"] == {"a": "nan", "b": 3, "c": 0.5}
    assert report["findings"][0]["step"] == 2


def test_concise_has_one_line_a_finding_and_one_for_the_verdict() -> None:
    lines = concise.render(samples.diverged("eval.py")).splitlines()
    assert len(lines) == 5
    assert re.match(r"eval\.py:5: BN001 error features\.norm1 .*\(10 tasks\)$", lines[0])
    assert lines[-1].startswith("diverged: stale-running-stats (confirmed)")
    assert len(concise.render(samples.hostile()).splitlines()) == 4


def test_github_escapes_properties_and_data() -> None:
    mark = Mark("a,b:c%.py:7", "x")
    finding = Finding("X1", "na:me", Severity.WARNING, "100 %\nnext\r::error::x", marks=(mark,))
    lines = github.render(Diagnosis("suspect", Summary(1, 1), findings=(finding,))).splitlines()
    expected = "::warning file=a%2Cb%3Ac%25.py,line=7,title=X1 na%3Ame::100 %25%0Anext"
    assert lines[1].startswith(expected)
    assert "\r" not in lines[1]


@pytest.mark.parametrize("name", samples.ALL)
def test_github_lines_are_all_our_own_commands(name: str) -> None:
    diagnosis = samples.ALL[name]()
    lines = github.render(diagnosis).splitlines()
    assert len(lines) == 1 + len(diagnosis.findings)
    ours = re.compile(r"::(error|warning|notice) [^:]*::|healthy: ")
    assert all(ours.match(line) for line in lines)


@pytest.mark.parametrize("name", samples.ALL)
def test_junit_is_well_formed_and_counts_right(name: str) -> None:
    root = ElementTree.fromstring(junit.render(samples.ALL[name]()).encode("utf-8"))
    assert root.tag == "testsuites"
    cases = root.findall("testsuite/testcase")
    assert int(root.attrib["tests"]) == len(cases) >= 1
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert int(root.attrib[attribute]) == len(root.findall(f"testsuite/testcase/{tag}"))


def test_junit_says_how_long_the_run_was_watched() -> None:
    healthy = samples.healthy()
    timed = replace(healthy, summary=replace(healthy.summary, seconds=1.25))
    root = ElementTree.fromstring(junit.render(timed))
    assert [root.attrib["time"], root[0].attrib["time"], root[0][0].attrib["time"]] == ["1.250"] * 3


def test_junit_fails_what_fails_the_run() -> None:
    def outcomes(diagnosis: Diagnosis) -> dict[str, str]:
        root = ElementTree.fromstring(junit.render(diagnosis).encode("utf-8"))
        return {case.attrib["name"]: case[0].tag for case in root.iter("testcase")}

    assert outcomes(samples.diverged())["diverged"] == "failure"
    assert outcomes(samples.healthy()) == {"healthy": "system-out"}
    assert outcomes(samples.unobserved()) == {"unobserved": "skipped"}
    assert outcomes(samples.suspect()) == {
        "suspect": "error",
        "LR002 ineffective-inner-step": "system-out",
        "PT001 unused-parameters": "system-out",
    }


def test_sarif_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = _strict(sarif.render(samples.diverged(str(tmp_path / "my eval.py"))))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules, results = run["tool"]["driver"]["rules"], run["results"]
    assert len({rule["id"] for rule in rules}) == len(rules) == 4
    assert all(rule["help"]["text"] for rule in rules)
    assert [result["level"] for result in results] == ["error", "error", "error", "note"]
    for result in results:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    place = results[0]["locations"][0]["physicalLocation"]
    assert place == {
        "artifactLocation": {"uri": "my%20eval.py", "uriBaseId": "SRCROOT"},
        "region": {"startLine": 5},
    }
    assert results[1]["properties"]["evidence"]["last"] == "inf"


def test_sarif_help_is_the_rules_own_documentation() -> None:
    (run,) = sarif.to_sarif(samples.diverged())["runs"]
    rules = {rule["id"]: rule for rule in run["tool"]["driver"]["rules"]}
    documentation = NormExplosion.documentation()
    assert rules["NG001"]["fullDescription"]["text"] == documentation[""]
    assert documentation["Why it is bad"] in rules["NG001"]["help"]["text"]
    assert "## Why it is bad" in rules["NG001"]["help"]["markdown"]


def test_sarif_fingerprint_outlives_moved_lines() -> None:
    def fingerprint(site: str, layer: str) -> str:
        finding = Finding("X1", "x", Severity.ERROR, "m", layer=layer, marks=(Mark(site, ""),))
        log = sarif.to_sarif(Diagnosis("suspect", Summary(), findings=(finding,)))
        return str(log["runs"][0]["results"][0]["partialFingerprints"])

    assert fingerprint("a.py:1", "l") == fingerprint("a.py:9", "l")
    assert fingerprint("a.py:1", "l") != fingerprint("b.py:1", "l")
    assert fingerprint("a.py:1", "l") != fingerprint("a.py:1", "m")


@pytest.mark.parametrize("name", samples.ALL)
def test_sarif_is_strict_json(name: str) -> None:
    _strict(sarif.render(samples.ALL[name]()))


def test_markdown_lets_no_markup_through() -> None:
    finding = Finding(
        "X1", "x", Severity.ERROR, "<img src=x> @team #12 https://evil [a](b) *b* | c `d`"
    )
    text = markdown.render(Diagnosis("suspect", Summary(1, 1), findings=(finding,)))
    row = next(line for line in text.splitlines() if line.startswith("| error"))
    assert "<img" not in row and "@team" not in row and "https://" not in row
    assert r"\[a\](b) \*b\* \| c \`d\`" in row and r"\#12" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_markdown_fence_is_longer_than_any_in_the_code() -> None:
    text = markdown.render(samples.hostile())
    finding = Finding("X1", "x", Severity.ERROR, "m", fix="````\ncode\n````")
    text = markdown.render(Diagnosis("suspect", Summary(1, 1), findings=(finding,)))
    assert "`````python\n````\ncode\n````\n`````" in text
