"""NF001 and NF002."""

import pytest

from divergence_probe.record.schema import MISSING
from divergence_probe.rules.finding import Severity

from .blocks import INF, NAN, OUTER_SITE, inner, make, one, outer, place, silent, train


@pytest.mark.parametrize(
    ("columns", "first_bad", "layer"),
    [
        ({"loss": NAN}, "loss", None),
        ({"loss": INF}, "loss", None),
        ({"gradient_norm": [1, NAN, 1]}, "gradient", "body.0"),
        ({"norm_after": [1, 1, INF]}, "parameter", "head"),
        ({"norm_before": [1, 1, NAN]}, "parameter", "head"),
        (train(bn_input_finite=0), "activation", "norm"),
        # in order: a parameter was bad before the loss was
        ({"norm_before": [NAN, 1, 1], "loss": NAN}, "parameter", "body.0"),
        ({"loss": NAN, "gradient_norm": NAN}, "loss", None),
    ],
)
def test_the_first_bad_number_is_named(columns, first_bad, layer):
    block = make(inner(3, 0, **train()), inner(3, 1, **train() | columns), batch_norms=["norm"])

    finding = one("NF001", block)

    assert place(finding) == (None, Severity.ERROR, layer, 3, 1)
    assert finding.evidence["first_bad"] == first_bad


def test_what_is_absent_or_unseen_is_finite():
    assert silent(
        "NF001",
        make(
            inner(gradient_norm=MISSING, norm_before=MISSING, norm_after=MISSING),
            inner(step=1, loss=NAN, loss_seen=0),
            outer(gradient_norm=NAN),
            batch_norms=["norm"],
        ),
    )


def test_a_norm_near_the_top_of_the_range_is_finite():
    assert silent("NF001", make(inner(norm_after=1e38, gradient_norm=1e38, loss=1e38)))


def test_the_meta_gradient_is_not_finite():
    finding = one("NF002", make(inner(), outer(gradient_norm=[1, 1, NAN])))

    assert place(finding) == (None, Severity.ERROR, "head", None, None)
    assert finding.phase == "outer" and finding.marks[0].site == OUTER_SITE


def test_a_bad_inner_gradient_is_no_bad_meta_gradient():
    assert silent("NF002", make(inner(gradient_norm=NAN), outer(gradient_norm=[1, MISSING, 2])))
