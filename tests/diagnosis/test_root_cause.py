"""Which cause is chosen where several findings name one."""

import pytest

from divergence_probe.diagnosis.root_cause import PRECEDENCE, root_cause
from divergence_probe.rules.finding import Finding, Mark, Severity
from divergence_probe.rules.registry import all_rules

INFO, WARNING, ERROR = Severity


def finding(rule, cause, severity=WARNING, task=0, step=0, **more):
    return Finding(rule, rule, severity, f"{rule} says so", cause, task=task, step=step, **more)


EXPLOSION = finding("NG001", None, ERROR, step=4)
NOT_FINITE = finding("NF001", None, ERROR, step=9)
STALE = finding("BN002", "stale-running-stats")
TOO_HIGH = finding("LR001", "inner-lr-too-high")
MISMATCH = finding("MODE001", "train-eval-mismatch")


@pytest.mark.parametrize("findings", [(TOO_HIGH, STALE), (STALE, TOO_HIGH)])
@pytest.mark.parametrize("symptoms", [(), (EXPLOSION,), (EXPLOSION, NOT_FINITE)])
def test_stale_statistics_make_any_learning_rate_too_high(findings, symptoms):
    answer = root_cause((*symptoms, *findings))

    assert answer is not None and answer.cause == "stale-running-stats"
    assert answer.confidence == "inferred"


def test_an_explosion_is_explained_by_a_cause_that_can_make_one():
    harmless = finding("OPT003", "hard-clipping", ERROR, step=0)

    answer = root_cause((harmless, EXPLOSION, MISMATCH, TOO_HIGH))

    assert answer is not None and answer.cause == "inner-lr-too-high"
    assert answer.findings == (3, 1)  # the telling one, then its symptom


def test_without_a_symptom_the_more_severe_cause_is_the_root():
    answer = root_cause((STALE, finding("MG001", "no-meta-gradient", ERROR)))

    assert answer is not None and answer.cause == "no-meta-gradient"


def test_a_meta_gradient_explosion_is_explained_by_what_made_it():
    exploded = finding("MG002", "meta-gradient-explosion", ERROR, task=None, step=None)

    assert root_cause((exploded,)).cause == "meta-gradient-explosion"
    assert root_cause((exploded, TOO_HIGH)).cause == "inner-lr-too-high"


def test_of_one_cause_the_earliest_finding_tells():
    later, earlier = (
        finding("LR001", "inner-lr-too-high", task=1),
        finding("LR9", "inner-lr-too-high", task=0),
    )

    assert root_cause((later, earlier)).findings == (1, 0)


def test_symptoms_alone_and_remarks_name_no_cause():
    assert root_cause(()) is None
    assert root_cause((EXPLOSION, NOT_FINITE)) is None
    assert root_cause((finding("MG003", "first-order-only", INFO),)) is None


def test_lines_are_told_once_and_not_too_many():
    marks = tuple(Mark(f"a.py:{line}", "x") for line in (1, 2, 3))
    again = tuple(Mark(f"a.py:{line}", "y") for line in (3, 4, 5))
    first = finding("BN001", "stale-running-stats", ERROR, marks=marks)
    symptom = finding("NG001", None, ERROR, marks=again)

    answer = root_cause((first, symptom))

    assert [mark.site for mark in answer.marks] == ["a.py:1", "a.py:2", "a.py:3", "a.py:4"]
    assert answer.marks[2].text == "x"


def test_every_rule_s_cause_has_a_place():
    assert {rule.cause for rule in all_rules()} - {None} <= set(PRECEDENCE)
