"""EX001."""

import pytest

from divergence_probe.record.schema import Event
from divergence_probe.rules.finding import Severity

from .blocks import HERE, inner, make, one, place, silent

TINY = "Expected more than 1 value per channel when training, got input size torch.Size([1, 8])"


def raised(**changes):
    data = {
        "type": "RuntimeError", "message": "a bad thing", "inner_loop": True, "own": False,
        "layer": "body.0", "module": "", "unused": [], "in_task": 2, "at_step": 1,
    }  # fmt: skip
    return make(inner(2), events=[Event("raised", -1, -1, 0.0, HERE, data | changes)])


def test_an_exception_out_of_an_inner_loop():
    finding = one("EX001", raised())

    assert place(finding) == ("raised-in-inner-loop", Severity.ERROR, "body.0", 2, 1)
    assert dict(finding.evidence) == {"exception": "RuntimeError", "message": "a bad thing"}
    assert finding.marks[0].site == HERE


def test_an_exception_outside_is_the_script_s_own():
    assert silent("EX001", raised(inner_loop=False))


def test_what_torch_says_is_put_into_words():
    finding = one("EX001", raised(type="ValueError", message=TINY, module="BatchNorm1d"))

    assert finding.cause == "tiny-bn-batch" and "GroupNorm" in finding.fix


@pytest.mark.parametrize("changes", [{"own": True}, {"message": "loss is NaN"}])
def test_a_symptom_has_no_cause_of_its_own(changes):
    assert one("EX001", raised(**changes)).cause is None
