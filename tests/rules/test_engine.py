"""Folding, order, task memory, and that every rule has its tests here."""

from pathlib import Path

import pytest

from divergence_probe.record.schema import Layout, ParameterInfo
from divergence_probe.rules.engine import Engine
from divergence_probe.rules.finding import Finding, Severity
from divergence_probe.rules.registry import all_rules
from divergence_probe.rules.selection import Selection

from .blocks import end, inner, make, outer, rule, start


def engine(*codes, **options):
    return Engine([rule(code) for code in codes], **options)


def test_findings_of_a_kind_fold_into_the_first_place():
    rules = engine("OPT002")

    carried = (inner(1, 1, carried_gradient=2.0), inner(1, 2, carried_gradient=2.0))
    fresh = rules.feed(make(inner(0), *carried))
    again = rules.feed(make(inner(2, 0, carried_gradient=9.0), inner(3, 0, carried_gradient=9.0)))

    assert len(fresh) == 1 and again == []
    (finding,) = rules.findings
    assert (finding.count, finding.task, finding.step) == (3, 1, 1)
    assert finding.evidence["carried_gradient_norm"] == 2.0


def test_layers_are_a_union_in_the_order_they_were_seen():
    rules = engine()
    for layers in (("b", "c"), ("a", "b")):
        rules.add(Finding("X", "x", Severity.ERROR, "m", layers=layers))

    assert rules.findings[0].layers == ("b", "c", "a")


def test_a_more_severe_finding_of_the_kind_takes_its_place():
    rules = engine()

    assert rules.add(Finding("X", "x", Severity.INFO, "mild", task=0))
    assert rules.add(Finding("X", "x", Severity.WARNING, "bad", task=5, count=2))
    assert not rules.add(Finding("X", "x", Severity.INFO, "mild", task=6))

    (finding,) = rules.findings
    assert (finding.message, finding.severity) == ("bad", Severity.WARNING)
    assert (finding.count, finding.task) == (4, 5)


def test_another_cause_or_rank_is_another_finding():
    rules = engine()
    for cause, rank in (("a", 0), ("b", 0), ("a", 1), ("a", 0)):
        rules.add(Finding("X", "x", Severity.ERROR, "m", cause=cause, rank=rank))

    assert sorted(f.count for f in rules.findings) == [1, 1, 2]


def test_the_most_severe_come_first_then_the_earliest():
    rules = engine()
    for name, severity, task in (
        ("A", Severity.INFO, 0), ("B", Severity.ERROR, None), ("C", Severity.ERROR, 3),
        ("D", Severity.ERROR, 1), ("E", Severity.WARNING, 0),
    ):  # fmt: skip
        rules.add(Finding(name, name, severity, "m", task=task))

    assert [f.rule for f in rules.findings] == ["D", "C", "B", "E", "A"]


def test_ranks_have_their_own_tasks():
    rules = engine("NG001")
    for rank, norm in ((0, 10.0), (1, 1000.0)):
        before = inner(norm_before=norm, norm_after=norm)
        rules.feed(make(before, events=[start()], rank=rank))

    assert rules.feed(make(inner(step=1, norm_after=1000.0), rank=1)) == []
    (finding,) = rules.feed(make(inner(step=1, norm_after=1000.0), rank=0))
    assert finding.rank == 0


def test_a_vmapped_task_stands_for_several():
    rules = engine("NG001")
    rows = [inner(task, norm_before=10, norm_after=500 * task) for task in range(3)]

    rules.feed(make(*rows, inner(0, 1), events=[start(width=3)]))

    (finding,) = rules.findings
    assert (finding.task, finding.count) == (1, 2)


def test_ended_tasks_are_forgotten():
    rules = engine("NG001", "LG001", "LR001")
    for task in range(0, 600, 3):
        events = [start(task, width=3), end(task)]
        rules.feed(make(*(inner(t) for t in range(task, task + 3)), events=events))

    assert rules._tasks == {}


def test_a_block_of_another_model_does_not_disturb_a_task():
    rules = engine("NG001")
    rules.feed(make(inner(norm_before=10, norm_after=10), events=[start()]))
    rules.feed(make(inner(step=1), parameters=["other.weight"]))

    assert [f.step for f in rules.feed(make(inner(step=2, norm_after=500)))] == [2]


def test_no_rule_speaks_of_a_healthy_loop_or_of_nothing():
    rules = Engine(all_rules())
    rules.feed(make())
    for task in range(5):
        rows = [
            inner(
                task, step, loss=1 - step / 10, flags=1, norm_before=10 + step / 10,
                norm_after=10 + (step + 1) / 10,
            )
            for step in range(4)
        ]  # fmt: skip
        rules.feed(make(*rows, outer(norm_before=10, norm_after=10), events=[start(task)]))
    rules.finish()

    assert rules.findings == ()


@pytest.mark.parametrize("code", [rule.code for rule in all_rules()])
def test_every_rule_is_tested_both_ways(code):
    tests = "".join(p.read_text("utf-8") for p in Path(__file__).parent.glob("test_*.py"))

    if code.startswith("FX") and code != "FX006":
        assert f'("{code}", ' in tests  # the silent ones are a loop over all of them
    else:
        assert f'one("{code}"' in tests and f'silent("{code}"' in tests


def test_rules_that_are_not_selected_do_not_run():
    rules = Engine(all_rules(), Selection(select=("NG",)))

    assert rules.feed(make(inner(carried_gradient=1.0, norm_after=[500, 1, 1])))
    assert [f.rule for f in rules.findings] == ["NG001"]


def test_a_task_counts_once_however_many_blocks_it_takes():
    rules = engine("NF001")
    for task in range(2):
        for step in range(3):
            rules.feed(make(inner(task, step, loss=float("nan"))))

    (finding,) = rules.findings
    assert (finding.count, finding.unit) == (2, "task")


def test_what_is_counted():
    rules = engine("NF002", "OPT003", "NG001")
    for task in range(8):
        clipped = inner(task, flags=16 | 128, norm_after=[500, 1, 1])
        rules.feed(make(clipped, outer(gradient_norm=[float("inf"), 1, 1])))
    rules.finish()

    assert {f.rule: (f.count, f.unit) for f in rules.findings} == {
        "NF002": (8, "outer step"), "OPT003": (8, "step"), "NG001": (8, "task"),
    }  # fmt: skip


def test_layers_that_are_but_numbers_are_called_layers():
    infos = (
        ParameterInfo("1.weight", (4,), "float32", "cpu", "BatchNorm2d"),
        ParameterInfo("head.weight", (4,), "float32", "cpu", "Linear"),
    )
    block = make(inner(), parameters=["1.weight", "head.weight"])
    block.layout = Layout(0, "Net", infos, ["1", "4"])
    frame = engine()._frame(block)

    assert frame.called(["1"]) == "layer 1 (BatchNorm2d)"
    assert frame.called(["4", "1"]) == "layer 4 and 1 more layer"
    assert frame.called(["head", "1", "4"]) == "head and 2 more layers"
