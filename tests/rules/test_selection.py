"""Which findings are kept."""

import pytest

from divergence_probe.errors import UsageError
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.selection import INTENTS, Selection, parse_codes

from .blocks import rule

CODES = ("BN001", "BN002", "NG001")


def finding(code="BN001", layer=None, cause=None):
    return Finding(code, "x", Severity.ERROR, "m", layer=layer, cause=cause)


@pytest.mark.parametrize(
    ("select", "ignore", "kept"),
    [
        ((), (), {"BN001", "BN002", "NG001"}),
        (("BN",), (), {"BN001", "BN002"}),
        (("BN001", "NG"), (), {"BN001", "NG001"}),
        ((), ("BN",), {"NG001"}),
        (("BN001",), ("BN",), {"BN001"}),  # the longest prefix decides
        (("BN",), ("BN001",), {"BN002"}),
        (("BN",), ("BN",), set()),
        (("XX",), (), set()),
    ],
)
def test_the_longest_prefix_decides(select, ignore, kept):
    selection = Selection(select, ignore)

    assert {code for code in CODES if selection.keeps(finding(code))} == kept
    assert {code for code in CODES if selection.runs(rule(code))} == kept


def test_a_code_ignored_for_some_layers():
    selection = Selection(ignore=("BN001:body.*",))

    assert selection.runs(rule("BN001"))
    assert not selection.keeps(finding(layer="body.norm1"))
    assert selection.keeps(finding(layer="head.norm"))
    assert selection.keeps(finding(layer=None))
    assert selection.keeps(finding("BN002", layer="body.norm1"))


@pytest.mark.parametrize(("intent", "causes"), INTENTS.items())
def test_an_intent_silences_its_causes_only(intent, causes):
    selection = Selection(intent=(intent,))

    assert not any(selection.keeps(finding(cause=cause)) for cause in causes)
    assert selection.keeps(finding(cause="inner-lr-too-high"))
    assert selection.keeps(finding(cause=None))


def test_an_unknown_intent():
    with pytest.raises(UsageError, match=r"Unknown intent 'reptil'\. Choose from: reptile"):
        Selection(intent=("reptil",))


def test_codes_are_checked():
    assert parse_codes(["BN, NG001", "BN001:body.*"], CODES) == ("BN", "NG001", "BN001:body.*")
    with pytest.raises(UsageError, match="No rule starts with 'ZZ'"):
        parse_codes(["BN,ZZ"], CODES)
