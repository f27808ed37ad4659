"""Which findings are kept."""

import pytest

from divergence_probe.errors import UsageError
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.selection import INTENTS, Selection, parse_codes

from .blocks import rule

CODES = ("BN001", "BN002", "NG001")
KNOWN = {"BN001": "untrained", "BN002": "distant", "NG001": "norm-explosion"}


def finding(code="BN001", layer=None, cause=None, layers=()):
    return Finding(code, "x", Severity.ERROR, "m", layer=layer, cause=cause, layers=layers)


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


def test_a_code_selected_for_some_layers():
    selection = Selection(select=("BN001:body.*", "NG"))

    assert selection.runs(rule("BN001")) and not selection.runs(rule("BN002"))
    assert selection.keeps(finding(layer="body.norm1"))
    assert not selection.keeps(finding(layer="head.norm"))
    assert not selection.keeps(finding(layer=None))
    assert selection.keeps(finding("NG001", layer="head"))


@pytest.mark.parametrize(
    ("select", "ignore", "kept"),
    [
        (("BN001:body.*",), ("BN001",), {"body.norm"}),  # of two as long, the one for layers
        (("BN001",), ("BN001:body.*",), {"head.norm"}),
        (("BN001:*.norm",), ("BN001:body.*",), {"head.norm"}),  # then the one that ignores
        (("BN001:body.*",), ("BN:body.*",), {"body.norm"}),  # the longer code
        ((), (":head.*",), {"body.norm"}),  # every rule in these layers
        ((), ("BN:BODY.*",), {"body.norm", "head.norm"}),  # names are told apart by case
        ((), ("BN001:*",), set()),
        ((), ("BN001:[ab]ody.?orm",), {"head.norm"}),
    ],
)
def test_what_is_for_certain_layers(select, ignore, kept):
    selection = Selection(select, ignore)

    assert {x for x in ("body.norm", "head.norm") if selection.keeps(finding(layer=x))} == kept


def test_a_finding_in_several_layers():
    both = finding(layer="body.norm", layers=("body.norm", "head.norm"))

    assert Selection(ignore=("BN001:body.*",)).keeps(both)
    assert not Selection(ignore=("BN001:*.norm",)).keeps(both)
    assert Selection(select=("BN001:head.*",)).keeps(both)


def test_the_name_of_a_layer_nobody_named():
    selection = Selection(ignore=("BN001:batch_norm[0]",))

    assert not selection.keeps(finding(layer="batch_norm[0]"))
    assert selection.keeps(finding(layer="batch_norm[1]"))


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
    assert parse_codes(["BN, NG001", "BN001:body.*"], KNOWN) == ("BN", "NG001", "BN001:body.*")
    assert parse_codes("BN001", KNOWN) == ("BN001",)
    assert parse_codes((), KNOWN) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BN,ZZ", r"--ignore: No rule starts with 'ZZ'\. Write a code \(BN003\)"),
        ("bn001", "No rule starts with 'bn001'. Did you mean BN001"),
        ("norm-explosion:body.*", "Did you mean NG001"),
        ("BN01:body.*", "No rule starts with 'BN01'. Did you mean BN001"),
        ("BN001:", r"'BN001:' names no layers\. .*BN001 alone for every layer"),
        ("BN:block[0", r"'BN:block\[0': the \[ in the glob 'block\[0' is never closed"),
    ],
)
def test_what_is_wrong_with_an_entry(text, message):
    with pytest.raises(UsageError, match=message):
        parse_codes([text], KNOWN, "--ignore")
