"""FX001 to FX006."""

import pytest

from divergence_probe.record.schema import FLAGS, MISSING, Event
from divergence_probe.rules.finding import Severity

from .blocks import HERE, INF, QUERY_SITE, inner, make, one, outer, place, silent

CODES = ("FX001", "FX002", "FX003", "FX004", "FX005")
DATA = {
    "what": "operation", "operation": "log", "phase": "forward", "dtype": "float32",
    "input_dtype": "float32", "minimum": 0.0, "maximum": 1.0, "zeros": 2, "nonfinite": 0,
    "elements": 12, "certain": True, "layer": "head", "layers": ["head", "body.0"],
    "in_task": 3, "in_step": 1, "gradient_site": QUERY_SITE, "largest": 4.0, "growth": 1.1,
}  # fmt: skip


def block(**changes):
    return make(inner(3), events=[Event("forensics", -1, -1, 0.0, HERE, DATA | changes)])


@pytest.mark.parametrize(
    ("code", "cause", "changes"),
    [
        ("FX001", "nonfinite-input", {"what": "input", "nonfinite": 1, "largest": INF}),
        ("FX002", "singular-forward", {}),
        ("FX003", "singular-backward", {"operation": "sqrt", "phase": "backward"}),
        ("FX003", "singular-backward", {"operation": "norm", "phase": "second backward"}),
        ("FX004", "adam-sqrt-zero", {"operation": "sqrt", "phase": "update"}),
        ("FX005", "low-precision", {"operation": "pow", "dtype": "float16"}),
        ("FX005", "low-precision", {"what": "update", "dtype": "bfloat16", "phase": "update"}),
    ],
)
def test_one_event_is_one_rule_s(code, cause, changes):
    finding = one(code, block(**changes))

    assert place(finding) == (cause, Severity.ERROR, "head", 3, 1)
    assert finding.layers == ("head", "body.0")
    assert [mark.site for mark in finding.marks] == [HERE, QUERY_SITE]
    assert finding.fix and finding.evidence["operation"] == (changes | DATA | changes)["operation"]
    for other in CODES:
        assert other == code or silent(other, block(**changes))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("after", [{"largest": 1e20}, {"growth": 20.0}])
def test_the_end_of_an_explosion_is_no_singular_operation(code, after):
    for phase in ("forward", "backward", "update"):
        assert silent(code, block(phase=phase, **after))


def test_what_was_only_inferred_says_so():
    finding = one("FX003", block(operation="sqrt", phase="backward", certain=False, in_task=-1))

    assert "seen" in finding.evidence and "most likely" in finding.message
    assert finding.task is None


def test_half_precision_that_does_not_move():
    rows = (inner(1, update_norm=0.0), inner(1, 1, update_norm=0.0))

    finding = one("FX006", make(*rows, dtype="bfloat16"))

    assert place(finding) == ("low-precision", Severity.WARNING, "body.0", 1, 0)
    assert finding.evidence["dtype"] == "bfloat16"


def rounded(task=0, step=0, **columns):
    """A step of rate 0.001 that would move a weight of norm 10 by a ten thousandth."""
    kept = {"update_norm": [2e-5, 2e-5, 1e-3], "step_rate": [2e-5, 2e-5, 1e-3]}
    return inner(
        task, step, learning_rate=0.001, **{"gradient_norm": [1, 1, 0.1], **kept, **columns}
    )


def test_half_precision_of_which_little_moves():
    finding = one("FX006", make(rounded(), rounded(step=1), dtype="bfloat16"))

    assert place(finding) == ("low-precision", Severity.WARNING, "body.0", 0, 0)
    assert finding.evidence["lost_share"] == pytest.approx(2 / 2.01)
    by_hand = [rounded(step=step) | {"learning_rate": float("-inf")} for step in (0, 1)]
    assert one("FX006", make(*by_hand, dtype="bfloat16"))


def test_half_precision_that_moves_as_far_as_it_should():
    whole = {"update_norm": [1e-3, 1e-3, 1e-4], "step_rate": 1e-3}
    assert silent("FX006", make(rounded(**whole), dtype="bfloat16"))
    large = rounded(gradient_norm=[100, 100, 10])  # a hundredth of the weights: not rounding
    assert silent("FX006", make(large, dtype="bfloat16"))
    assert silent("FX006", make(rounded()))


def test_half_precision_that_stands_still_after_it_has_moved():
    settled = inner(0, 1, update_norm=0.0)
    assert silent("FX006", make(inner(), settled, dtype="bfloat16"))
    assert silent("FX006", make(inner(), dtype="bfloat16"), make(settled, dtype="bfloat16"))


def test_steps_of_half_precision_are_never_called_too_small():
    tiny = {"update_norm": 1e-6, "step_rate": 1e-6}
    assert one("LR002", make(inner(**tiny)))
    assert silent("LR002", make(inner(**tiny), dtype="bfloat16"))
    assert one("FX006", make(inner(**tiny), dtype="bfloat16"))


def test_half_precision_that_moves_or_has_no_gradient():
    assert silent("FX006", make(inner(update_norm=[0, 0, 0.1]), dtype="float16"))
    assert silent("FX006", make(inner(update_norm=0, gradient_norm=0), dtype="float16"))
    assert silent("FX006", make(inner(update_norm=0, gradient_norm=MISSING), dtype="float16"))
    assert silent("FX006", make(inner(update_norm=0)))  # float32: LR002's and LR004's


def still_base(count=4, **columns):
    return [outer(update_norm=0.0, **columns) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_base_that_no_outer_step_moves(dtype):
    finding = one("FX006", make(*still_base(), dtype=dtype))

    assert (finding.cause, finding.phase, finding.layer) == ("low-precision", "outer", "body.0")
    by_hand = {"learning_rate": float("-inf"), "flags": float(FLAGS["rounded"])}
    assert one("FX006", make(*still_base(**by_hand), dtype=dtype))


def test_a_base_that_moves_once_or_has_no_reason_to():
    assert silent("FX006", make(*still_base(), outer()))
    assert silent("FX006", make(*still_base()), make(outer()))
    assert silent("FX006", make(*still_base(2)))
    assert silent("FX006", make(*still_base(learning_rate=0.0)))
    assert silent("FX006", make(*still_base(gradient_norm=0.0)))
    assert silent("FX006", make(*still_base(learning_rate=float("-inf"))))  # not seen to be made
