"""The HTML report: one file that loads nothing, runs nothing and shows hostile names as text."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from divergence_probe.diagnosis.diagnosis import Diagnosis, NormTrace, Summary
from divergence_probe.report import charts, html

from . import samples

_VOID = {"meta", "br", "hr", "img", "input", "link"}


class _Page(HTMLParser):
    """Checks that tags nest; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", samples.ALL)
@pytest.mark.parametrize("form", [html.render, html.fragment])
def test_nests_and_loads_and_runs_nothing(name: str, form: object) -> None:
    assert callable(form)
    text = form(samples.ALL[name]())
    page = _Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [n for n, _ in page.attributes if n.startswith("on") or n in ("src", "href")]
    assert not re.search(r"url\(|@import|https?://", text)


def test_hostile_names_are_text() -> None:
    text = html.render(samples.hostile())
    page = _Page(text)
    assert "<script>alert(1)</script> {{7*7}}" in page.text
    assert "49" not in text.split("</style>")[-1].replace("249", "")
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in text


def test_answers_stand_in_the_page() -> None:
    page = _Page(html.render(samples.diverged()))
    for words in ("An inner loop blew up", "Eval-mode BatchNorm", "net.train()", "×5.7e12",
                  "BN001", "Only rank 0", "18.4 σ", "probe report"):  # fmt: skip
        assert words in page.text
    assert "svg" in page.tags


def test_charts_name_themselves_and_have_a_table() -> None:
    page = _Page(html.render(samples.diverged()))
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert sum("the table below" in (label or "") for label in labels) == 2
    assert page.tags.count("table") == 3


def test_norm_chart_stays_inside_its_area() -> None:
    chart = charts.norm_chart(samples.norms())
    assert chart is not None and chart.broken
    for series in chart.series:
        for dot in series.dots:
            assert chart.left <= dot.x <= chart.width - chart.right
            assert 0 <= dot.y <= chart.height - chart.bottom + 1e-6
    heights = sorted(series.label_y for series in chart.series)
    assert all(below - above >= 15.9 for above, below in itertools.pairwise(heights))
    assert heights[0] >= 0 and heights[-1] <= chart.height


def test_charts_without_anything_to_draw() -> None:
    traces = (NormTrace("w", 0, (0.0, math.nan)), NormTrace("v", 0, ()))
    assert charts.norm_chart(traces) is None
    assert charts.distance_chart(()) is None
    _Page(html.render(Diagnosis("diverged", Summary(1, 1), norms=traces)))
