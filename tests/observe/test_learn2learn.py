"""learn2learn's learners, watched: clones are tasks, ``adapt`` is a step, BatchNorm is shared."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

l2l = pytest.importorskip("learn2learn")


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)
    )


def gbml(net, **options):
    def transform(parameter):
        return l2l.optim.ModuleTransform(l2l.nn.Scale)(parameter)

    return l2l.algorithms.GBML(net, transform=transform, lr=1e-4, adapt_transform=True, **options)


LEARNERS = {
    "MAML": lambda net, **options: l2l.algorithms.MAML(net, lr=0.05, **options),
    "MetaSGD": lambda net, **options: l2l.algorithms.MetaSGD(net, lr=0.05, **options),
    "GBML": gbml,
}


def data():
    return torch.randn(6, 1, 5, 5), torch.arange(6) % 3


def train(learner, iterations=2, tasks=2, steps=2):
    outer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    losses = []
    for _ in range(iterations):
        outer.zero_grad()
        for _ in range(tasks):
            x, y = data()
            clone = learner.clone()
            for _ in range(steps):
                loss = F.cross_entropy(clone(x), y)
                losses.append(loss.item())
                clone.adapt(loss)
            query = F.cross_entropy(clone(x), y)
            losses.append(query.item())
            query.backward()
        outer.step()
    return losses, [p.detach().clone() for p in learner.parameters()]


@pytest.mark.parametrize("kind", LEARNERS)
def test_tasks_steps_queries_and_outer_steps(kind):
    learner = LEARNERS[kind](network())
    with divergence_probe.attach() as probe:
        losses, _ = train(learner)
    assert probe.failure is None
    steps = probe.recording.steps()
    rows = steps[steps["parameter"] == "4.weight"]

    iteration = [*["support", "support", "query"] * 2, "outer"]
    assert rows["phase"].tolist() == iteration * 2
    assert rows[rows["phase"] != "outer"]["loss"].tolist() == pytest.approx(losses)
    assert set(steps["parameter"]) == {name for name, _ in learner.module.named_parameters()}
    assert (rows[rows["phase"] == "support"]["gradient_norm"] > 0).all()
    assert probe.recording.tasks()["optimizer"].tolist() == [kind] * 4


@pytest.mark.parametrize("kind", LEARNERS)
def test_results_are_bit_identical(kind):
    plain = train(LEARNERS[kind](network()))
    with divergence_probe.attach():
        probed = train(LEARNERS[kind](network()))

    assert plain[0] == probed[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], probed[1], strict=True))


@pytest.mark.parametrize("first_order", [False, True])
def test_order_is_noted(first_order):
    learner = LEARNERS["MAML"](network(), first_order=first_order)
    with divergence_probe.attach() as probe:
        train(learner, iterations=1)
    blocks = [block for block in probe.recording.blocks() if len(block)]
    flags = [
        f
        for b in blocks
        for f, p in zip(b.scalars["flags"], b.scalars["phase"], strict=True)
        if p == 0
    ]

    assert all(bool(int(flag) & 1) is not first_order for flag in flags)
    assert probe.recording.tasks()["first_order"].eq(first_order).all()


def test_the_clones_batch_norm_is_the_bases():
    learner = LEARNERS["MAML"](network())
    with divergence_probe.attach() as probe:
        train(learner, iterations=1)
    layers = probe.recording.batch_norm()

    assert set(layers["layer"]) == {"1"}
    assert layers["batches"].tolist() == [1, 2, 3, 4, 5, 6]  # one counter for every task


@pytest.mark.parametrize(
    ("features_train", "expected"), [(True, []), (False, ["stale-running-stats"])]
)
def test_features_under_an_adapted_head_run_for_its_tasks(features_train, expected):
    """Only the features that led to the loss: a random teacher in eval mode is to be as it is."""
    torch.manual_seed(0)
    features, teacher = (
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(2)
    )
    features.train(features_train)
    teacher.eval()
    head = l2l.algorithms.MAML(nn.Linear(16, 3), lr=0.1)
    outer = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-3)
    with divergence_probe.attach() as probe:
        for _ in range(4):
            x, y = 30 + 60 * torch.randn(30, 8), torch.arange(30) % 3
            seen, aside, learner = features(x), teacher(x), head.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(seen[:15]), y[:15]))
            loss = F.cross_entropy(learner(seen[15:] + 0 * aside[15:].detach()), y[15:])
            outer.zero_grad()
            loss.backward()
            outer.step()
    rows = probe.recording.batch_norm()

    assert [f.cause for f in probe.diagnosis.findings if f.severity.label == "error"] == expected
    assert list(rows[rows.phase == "support"]["step"]) == [0] * 4


def test_learning_rates():
    for kind, rate in (("MAML", 0.05), ("MetaSGD", 0.05), ("GBML", 1e-4)):
        learner = LEARNERS[kind](network())
        with divergence_probe.attach() as probe:
            train(learner, iterations=1)
        rates = probe.recording.steps().query("phase == 'support'")["learning_rate"]
        assert rates.tolist() == pytest.approx([rate] * len(rates))


def test_a_clone_of_a_clone_is_a_task_of_its_own():
    learner = LEARNERS["MAML"](network())
    with divergence_probe.attach() as probe:
        x, y = data()
        clone = learner.clone()
        clone.adapt(F.cross_entropy(clone(x), y))
        deeper = clone.clone()
        deeper.adapt(F.cross_entropy(deeper(x), y))
        deeper.adapt(F.cross_entropy(deeper(x), y))
    tasks = probe.recording.tasks()

    assert tasks["steps"].tolist() == [1, 2]
    assert tasks["parent"].tolist()[1] == 0
    steps = probe.recording.steps().query("phase == 'support' and parameter == '4.weight'")
    assert steps["norm_before"].iloc[1] == pytest.approx(steps["norm_after"].iloc[0])


def test_clones_made_together_keep_apart():
    learner = LEARNERS["MAML"](network())
    with divergence_probe.attach() as probe:
        clones = [learner.clone() for _ in range(3)]
        x, y = data()
        for _ in range(2):
            for clone in clones:
                clone.adapt(F.cross_entropy(clone(x), y))

    assert probe.recording.tasks()["steps"].tolist() == [2, 2, 2]


def test_no_clone_and_no_graph_is_kept_alive():
    learner = LEARNERS["MAML"](network())
    with divergence_probe.attach():
        x, y = data()
        clone = learner.clone()
        loss = F.cross_entropy(clone(x), y)
        clone.adapt(loss)
        kept = [weakref.ref(clone), weakref.ref(clone.module[4].weight), weakref.ref(loss)]
        del clone, loss
        gc.collect()

        assert [reference() for reference in kept] == [None] * 3


def test_everything_is_restored():
    before = [(c.clone, c.adapt) for c in (l2l.algorithms.MAML, l2l.algorithms.MetaSGD)]
    with divergence_probe.attach():
        assert l2l.algorithms.MAML.adapt is not before[0][1]

    assert [(c.clone, c.adapt) for c in (l2l.algorithms.MAML, l2l.algorithms.MetaSGD)] == before
