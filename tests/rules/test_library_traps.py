"""COMP001 and CKPT001."""

from divergence_probe.record.schema import Event
from divergence_probe.rules.finding import Severity

from .blocks import HERE, inner, make, one, place, silent, start


def test_a_compiled_copy():
    finding = one("COMP001", make(inner(1), events=[start(1, compiled=True)]))

    assert place(finding) == ("compiled-base-weights", Severity.ERROR, None, 1, None)
    assert finding.marks[0].site == HERE


def test_an_ordinary_copy():
    assert silent("COMP001", make(inner(1), events=[start(1, compiled=False), start(2)]))


def test_a_loss_of_the_base_weights():
    def event(compiled):
        return Event("runs-base-weights", 0, 1, 0.0, HERE, {"compiled": compiled})

    assert one("COMP001", make(inner(), events=[event(True)])).cause == "compiled-base-weights"
    assert one("COMP001", make(inner(), events=[event(False)])).cause == "no-parameter-change"


def test_a_recomputation_with_other_weights():
    event = Event("checkpoint-recompute", 0, 1, 0.0, HERE, {"layer": "body.block"})

    finding = one("CKPT001", make(inner(), events=[event]))

    assert place(finding) == ("checkpoint-recompute", Severity.ERROR, "body.block", 0, None)
    assert finding.layers == ("body.block",) and finding.marks[0].site == HERE


def test_a_recomputation_with_the_same_weights():
    event = Event("recomputed", 0, 1, 0.0, HERE, {"layer": "body.norm"})  # BN006's

    assert silent("CKPT001", make(inner(), events=[event]))
