"""What ranks recorded, side by side."""

import pytest

from divergence_probe.record.schema import Event
from divergence_probe.rules.finding import Severity

from .blocks import INF, NAN, evaluated, findings, inner, make, one, outer, query, silent, train

STEPS = 8
WEIGHTS = (10.0, 1.0, 2.0)


def group(world=2):
    return Event("process-group", -1, -1, 0.0, None, {"world": world, "backend": "gloo"})


def recorded(rank, *, weights=None, gradient=1.0, tasks=2, steps=3, world=2, settings=None, **more):
    """One rank's data parallel training: its own tasks, then an outer step, eight times.

    ``weights(k)`` are the base's norms at outer step k, ``settings(k, task, step)`` columns of an
    inner step; a callable ``gradient``, ``tasks`` or ``steps`` is asked for each outer step too.
    """

    def at(value, *where):
        return value(*where) if callable(value) else value

    rows, number = [], 0
    for k in range(STEPS):
        base = [x * (1 + k / 100) for x in WEIGHTS] if weights is None else weights(k)
        for task in range(at(tasks, k)):
            for step in range(at(steps, k, task)):
                start = base if step == 0 else [x * (1 + 0.1 * (rank + 1)) for x in base]
                own = {"loss": 1 + rank, "gradient_norm": 1 + rank + step, "norm_before": start}
                rows.append(inner(number, step, **own | at(settings or {}, k, task, step)))
            number += 1
        rows.append(outer(norm_before=base, norm_after=base, gradient_norm=at(gradient, k)))
    return make(*rows, rank=rank, events=[group(world)] if world > 1 else [], **more)


def parts_at(first, factor=1.001):
    """Base weights that part from the others' at an outer step."""
    return lambda k: [x * (1 + k / 100) * (factor if k >= first else 1) for x in WEIGHTS]


def test_other_tasks_on_other_ranks_are_no_divergence():
    assert silent("RANK001", recorded(0), recorded(1))


def test_weights_part_where_gradients_were_not_averaged():
    skips = recorded(1, weights=parts_at(4), gradient=lambda k: 1.0 if k < 3 else 2.0)

    finding = one("RANK001", recorded(0), skips)

    assert (finding.cause, finding.severity, finding.rank) == (
        "rank-divergence", Severity.WARNING, 1,
    )  # fmt: skip
    assert finding.message == (
        "the base weights on rank 1 are not rank 0's from outer step 4 on (body.0.weight ‖w‖ "
        "10.4104 against 10.4): the gradients of outer step 3 were not averaged over the ranks"
    )
    assert (finding.layer, finding.phase) == ("body.0", "outer")
    assert finding.evidence["quantity"] == "base weights"
    assert (finding.evidence["outer_step"], finding.evidence["ranks"]) == (4.0, "1")
    assert finding.marks[0].site == "train.py:30" and "all_reduce" in finding.fix


def test_weights_that_were_never_broadcast():
    finding = one("RANK001", recorded(0), recorded(1, weights=parts_at(0)))

    assert "from the start" in finding.message and "broadcast" in finding.fix
    assert finding.severity == Severity.WARNING


def test_equal_gradients_and_another_step():
    finding = one("RANK001", recorded(0), recorded(1, weights=parts_at(2)))

    assert "outer step 1 did something else with equal gradients" in finding.message


def test_weights_that_are_nan_on_one_rank():
    finding = one("RANK001", recorded(0), recorded(1, weights=parts_at(3, NAN)))

    assert "‖w‖ nan against" in finding.message


def test_of_three_ranks_the_odd_one_is_named_though_it_is_rank_0():
    others = [recorded(rank, world=3) for rank in (1, 2)]

    finding = one("RANK001", recorded(0, weights=parts_at(3), world=3), *others)

    assert finding.rank == 0
    assert "on rank 0 are not rank 1's from outer step 3" in finding.message


@pytest.mark.parametrize("column", ["learning_rate", "step_rate"])
def test_another_inner_learning_rate(column):
    # By hand; the last gradient is rounding, as that of a bias before BatchNorm.
    by_hand = {"learning_rate": -INF, "gradient_norm": [1, 2, 1e-7]}
    ranks = [
        recorded(rank, settings={"learning_rate": rate})
        if column == "learning_rate"
        else recorded(rank, settings={**by_hand, "step_rate": [rate, rate, 7 * rate]})
        for rank, rate in enumerate((0.01, 0.1))
    ]

    finding = one("RANK001", *ranks)

    assert "inner learning rate is 0.1 on rank 1 and 0.01 on rank 0" in finding.message
    assert finding.marks[0].site == "train.py:12"
    assert finding.evidence["outer_step"] == 0.0


def test_a_learned_rate_that_is_not_averaged_parts_later():
    def drifting(k, task, step):
        return {"learning_rate": 0.1 + max(k - 2, 0) / 100}

    finding = one("RANK001", recorded(0), recorded(1, settings=drifting))

    assert finding.evidence["outer_step"] == 3.0


def test_another_number_of_inner_steps():
    finding = one("RANK001", recorded(0), recorded(1, steps=5))

    assert "rank 1 took 5 inner steps a task and rank 0 3" in finding.message


@pytest.mark.parametrize("kind", ["batch_norm", "dropout"])
def test_a_rank_that_stays_in_eval_mode_after_its_evaluation(kind):
    def mode(rank):
        def settings(k, task, step):
            on = not (rank == 0 and k >= 5)
            return (train() if on else evaluated()) if kind == "batch_norm" else {"dropout": on}

        return settings

    names = {"batch_norms": ["norm"]} if kind == "batch_norm" else {"dropouts": ["drop"]}
    finding = one("RANK001", *(recorded(rank, settings=mode(rank), **names) for rank in (0, 1)))

    layer = "norm" if kind == "batch_norm" else "drop"
    assert f"{layer} runs in train mode on rank 1 and in eval mode on rank 0" in finding.message
    assert (finding.layer, finding.evidence["outer_step"]) == (layer, 5.0)


def test_what_is_set_comes_before_what_follows_from_it():
    odd = recorded(1, steps=5, weights=parts_at(0))

    finding = one("RANK001", recorded(0), odd)

    assert "inner steps a task" in finding.message
    assert finding.message.endswith("base weights differ from the start")


def statistics(rank, columns):
    return recorded(rank, settings=columns, batch_norms=["norm"])


def test_statistics_of_each_ranks_own_tasks_are_a_remark():
    ranks = [statistics(rank, train(bn_running_mean_before=1 + rank / 10)) for rank in (0, 1)]

    finding = one("RANK001", *ranks)

    assert (finding.severity, finding.layer) == (Severity.INFO, "norm")
    assert "‖mean‖ 1.1 against 1" in finding.message


def test_statistics_that_only_one_rank_has_trained():
    ranks = [
        statistics(rank, evaluated(bn_running_mean_before=1.0 - rank, bn_untrained=rank))
        for rank in (0, 1)
    ]

    finding = one("RANK001", *ranks)

    assert finding.severity == Severity.WARNING
    assert "never trained on rank 1" in finding.message


def test_runs_that_share_nothing_are_a_remark():
    finding = one("RANK001", recorded(0), recorded(1, weights=parts_at(0), gradient=2.0))

    assert finding.severity == Severity.INFO
    assert "are these runs independent?" in finding.message


def test_evaluation_that_starts_from_other_weights():
    tasks = [
        make(
            *(inner(t, s, norm_before=10 + rank) for t in range(2) for s in range(2)),
            rank=rank,
            events=[group()],
        )
        for rank in (0, 1)
    ]

    finding = one("RANK001", *tasks)

    assert "from the start" in finding.message and finding.severity == Severity.WARNING


def averaged_every_third(rank):
    return lambda k: [x * (1 + k / 100 + (k % 3) * rank / 100) for x in WEIGHTS]


def line_search(rank):
    return lambda k, task, step: {"learning_rate": 0.1 * (1 + (k + task + rank) % 2)}


def validated(rank):
    """A rank that evaluates in between: one more task, longer, in eval mode."""
    more = rank == 0

    def settings(k, task, step):
        return evaluated() if more and task == 2 and k % 3 == 2 else train()

    return recorded(
        rank,
        tasks=lambda k: 3 if more and k % 3 == 2 else 2,
        steps=lambda k, task: 9 if task == 2 else 3,
        settings=settings,
        batch_norms=["norm"],
    )


@pytest.mark.parametrize(
    "ranks",
    {
        "rounding": [recorded(0), recorded(1, weights=parts_at(2, 1 + 1e-6))],
        "weights averaged now and then": [
            recorded(rank, weights=averaged_every_third(rank), gradient=1.0 + rank)
            for rank in (0, 1)
        ],
        "no process group": [recorded(0, world=1), recorded(1, world=1, weights=parts_at(0))],
        "rank 0 alone": [recorded(0)],
        "a validation on rank 0": [validated(0), validated(1)],
        "early stopping": [
            recorded(rank, steps=lambda k, task, rank=rank: 2 + (k + task + rank) % 3)
            for rank in (0, 1)
        ],
        "a line search": [recorded(rank, tasks=1, settings=line_search(rank)) for rank in (0, 1)],
        "a rank that met one task less": [
            recorded(0),
            recorded(1, tasks=lambda k: 1 if k == STEPS - 1 else 2),
        ],
        "a zero bias": [
            recorded(rank, weights=lambda k, rank=rank: [10, 1e-12 * (1 + rank), 0])
            for rank in (0, 1)
        ],
        "both nan": [recorded(rank, weights=lambda k: [NAN, INF, 1]) for rank in (0, 1)],
    }.values(),
)  # fmt: skip
def test_what_must_stay_silent(ranks):
    assert silent("RANK001", *ranks)


def test_blocks_in_any_order_say_the_same():
    def pieces(rank, weights=None):
        rows = [
            row
            for k in range(6)
            for row in (inner(k, 0), outer(norm_before=10 + (k >= weights if weights else 0)))
        ]
        events = [[group()]] + [[]] * 5
        return [
            make(*rows[2 * k : 2 * k + 2], rank=rank, events=events[k], since=2.0 * k)
            for k in range(6)
        ]

    zero, odd = pieces(0), pieces(1, 3)
    turns = [block for both in zip(zero, odd, strict=True) for block in both]

    assert findings("RANK001", *zero, *odd) == findings("RANK001", *turns) != ()


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_was_done_before_there_was_a_group_need_not_be_alike(blocks):
    def rank_blocks(rank):
        made = Event("process-group", -1, -1, 1.5, None, {"world": 2})
        alone = [inner(learning_rate=1 + rank), outer(norm_before=5 + rank)]
        together = [inner(1), outer(norm_before=7), query(1)]
        if blocks == 1:
            return [make(*alone, *together, rank=rank, events=[made])]
        return [make(*alone, rank=rank), make(*together, rank=rank, events=[made], since=2.0)]

    assert silent("RANK001", *rank_blocks(0), *rank_blocks(1))
    others = [inner(2), inner(3), outer(norm_before=9)]
    odd = [inner(task, learning_rate=0.5) for task in (2, 3)] + [outer(norm_before=9)]
    ranks = [
        [*rank_blocks(rank), make(*rows, rank=rank, since=9.0)]
        for rank, rows in enumerate((others, odd))
    ]
    found = one("RANK001", *ranks[0], *ranks[1])
    assert "learning rate is 0.5 on rank 1" in found.message
    assert "from outer step 2 on" in found.message
