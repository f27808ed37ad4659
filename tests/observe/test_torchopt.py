"""TorchOpt's own loops, watched: its meta-optimizers, its state functions, its outer optimizers."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe
from divergence_probe.observe.libraries import torchopt as adapter

torchopt = pytest.importorskip("torchopt")


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)
    )


def data():
    return torch.randn(6, 1, 5, 5), torch.arange(6) % 3


def train(net, inner, outer, tasks=2, steps=2, iterations=2):
    """MAML as in TorchOpt's tutorial; gives every loss and the final weights."""
    losses = []
    for _ in range(iterations):
        weights = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        state = torchopt.extract_state_dict(inner, by="reference")
        queries = []
        for _ in range(tasks):
            x, y = data()
            for _ in range(steps):
                loss = F.cross_entropy(net(x), y)
                inner.step(loss)
                losses.append(loss.item())
            queries.append(F.cross_entropy(net(x), y))
            losses.append(queries[-1].item())
            torchopt.recover_state_dict(net, weights)
            torchopt.recover_state_dict(inner, state)
        outer.zero_grad()
        torch.stack(queries).mean().backward()
        outer.step()
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)
    return losses, [p.detach().clone() for p in net.parameters()]


def watched(**options):
    net = network()
    inner = torchopt.MetaSGD(net, lr=0.05)
    outer = torchopt.Adam(net.parameters(), lr=1e-2)
    with divergence_probe.attach() as probe:
        losses, _ = train(net, inner, outer, **options)
    assert probe.failure is None
    return probe.recording, losses


def test_tasks_steps_and_queries():
    recording, losses = watched()
    steps = recording.steps()
    rows = steps[steps["parameter"] == "0.weight"]

    assert len(recording.tasks()) == 4
    iteration = [*["support", "support", "query"] * 2, "outer"]
    assert rows["phase"].tolist() == iteration * 2
    seen = rows[rows["phase"] != "outer"]["loss"].tolist()
    assert seen == pytest.approx(losses)
    assert rows[rows["phase"] == "support"]["learning_rate"].tolist() == pytest.approx([0.05] * 8)
    assert (rows["task"][rows["phase"] == "support"] == [0, 0, 1, 1, 2, 2, 3, 3]).all()


def test_the_outer_step_is_torchopts_own():
    recording, _ = watched()
    outer = [event for event in recording.events() if event.kind == "outer-step"]

    assert [event.data["optimizer"] for event in outer] == ["Adam", "Adam"]
    assert outer[0].data["without_gradient"] == []
    rows = recording.steps().query("phase == 'outer' and parameter == '4.weight'")
    assert (rows["update_norm"] > 0).all()
    assert rows["learning_rate"].tolist() == pytest.approx([1e-2, 1e-2])


def test_batch_norm_is_named_and_belongs_to_its_step():
    recording, _ = watched()
    layers = recording.batch_norm()

    assert set(layers["layer"]) == {"1"}
    assert layers.query("phase == 'support'")["calls"].eq(1).all()
    assert len(layers.query("phase == 'query'")) == 4
    assert layers["batches"].iloc[0] == 1


def test_sites_are_the_users():
    recording, _ = watched()
    sites = recording.steps().query("phase != 'query'")["site"].unique()

    assert all("test_torchopt.py:" in site for site in sites)
    assert len(sites) == 2


def test_results_are_bit_identical():
    net = network()
    inner = torchopt.MetaSGD(net, lr=0.05, momentum=0.9)
    outer = torchopt.Adam(net.parameters(), lr=1e-2)
    plain = train(net, inner, outer)
    net = network()
    inner = torchopt.MetaSGD(net, lr=0.05, momentum=0.9)
    outer = torchopt.Adam(net.parameters(), lr=1e-2)
    with divergence_probe.attach():
        probed = train(net, inner, outer)

    assert plain[0] == probed[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], probed[1], strict=True))


def test_everything_is_restored():
    from torchopt.optim.base import Optimizer
    from torchopt.optim.meta.base import MetaOptimizer

    before = MetaOptimizer.step, MetaOptimizer.add_param_group, Optimizer.step
    code = torchopt.recover_state_dict.__code__
    with divergence_probe.attach():
        assert MetaOptimizer.step is not before[0]

    assert (MetaOptimizer.step, MetaOptimizer.add_param_group, Optimizer.step) == before
    assert torchopt.recover_state_dict.__code__ is code


def test_a_new_meta_optimizer_is_a_new_task():
    net = network()
    with divergence_probe.attach() as probe:
        for _ in range(3):
            inner = torchopt.MetaSGD(net, lr=0.05)
            x, y = data()
            inner.step(F.cross_entropy(net(x), y))
            inner.step(F.cross_entropy(net(x), y))

    assert probe.recording.tasks()["steps"].tolist() == [2, 2, 2]


def test_weights_loaded_in_place_are_a_new_task():
    net = network()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    inner = torchopt.MetaSGD(net, lr=0.05)
    with divergence_probe.attach() as probe:
        for _ in range(2):
            x, y = data()
            for _ in range(2):
                inner.step(F.cross_entropy(net(x), y))
            net.load_state_dict(start)
    steps = probe.recording.steps().query("phase == 'support'")
    first = steps[(steps["step"] == 0) & (steps["parameter"] == "4.weight")]["norm_before"]
    ends = steps[(steps["step"] == 1) & (steps["parameter"] == "4.weight")]["norm_after"]

    assert probe.recording.tasks()["steps"].tolist() == [2, 2]
    assert first.tolist() == pytest.approx([float(start["4.weight"].norm())] * 2)
    assert not math.isclose(ends.iloc[0], first.iloc[0], rel_tol=1e-9)


def test_an_optimizer_made_before_the_probe_is_named():
    net = network()
    inner = torchopt.MetaSGD(net, lr=0.05)
    with divergence_probe.attach() as probe:
        x, y = data()
        inner.step(F.cross_entropy(net(x), y))

    assert "4.weight" in set(probe.recording.steps()["parameter"])


def test_state_that_is_not_recovered_is_carried():
    net = network()
    inner = torchopt.MetaSGD(net, lr=0.05, momentum=0.9)
    with divergence_probe.attach() as probe:
        weights = torchopt.extract_state_dict(net)
        for _ in range(2):
            x, y = data()
            inner.step(F.cross_entropy(net(x), y))
            torchopt.recover_state_dict(net, weights)

    assert probe.recording.tasks()["carried_state"].tolist() == [False, True]


def test_no_graph_is_kept_alive():
    net = network()
    inner = torchopt.MetaSGD(net, lr=0.05)
    with divergence_probe.attach():
        weights = torchopt.extract_state_dict(net)
        x, y = data()
        loss = F.cross_entropy(net(x), y)
        inner.step(loss)
        fast = weakref.ref(net[4].weight)
        graph = weakref.ref(loss)
        torchopt.recover_state_dict(net, weights)
        del loss
        gc.collect()

        assert fast() is None
        assert graph() is None


@pytest.mark.parametrize(
    ("transformation", "rate"),
    [
        (torchopt.sgd(lr=0.25), 0.25),
        (torchopt.adam(lr=0.5), 0.5),
        (torchopt.adamw(lr=0.125), 0.125),
        (torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.sgd(lr=2.0)), 2.0),
        (torchopt.sgd(lr=torchopt.schedule.linear_schedule(0.1, 0.0, 10, 0)), None),
    ],
)
def test_learning_rate_of_a_transformation(transformation, rate):
    assert adapter.learning_rate(transformation.update) == rate


def test_a_learned_rate_is_kept_detached():
    rate = torch.tensor(0.1, requires_grad=True)
    found = adapter.learning_rate(torchopt.sgd(lr=rate).update)

    assert not found.requires_grad
    assert float(found) == pytest.approx(0.1)
