"""Outer steps that are told by where tasks begin, and moves of weights that are none."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

STEPS, ROUNDS = 3, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def train(net, steps=STEPS, optimizer=None):
    x = torch.randn(16, 2)
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(x), x[:, :1] * x[:, 1:]).backward()
        optimizer.step()


def between(start, ends, share):
    """State dicts: from ``start`` towards the mean of ``ends``."""
    return {
        name: value + share * (sum(end[name] for end in ends) / len(ends) - value)
        for name, value in start.items()
    }


def summary(net, run):
    with divergence_probe.attach() as probe:
        run(net)
    return probe.diagnosis.summary


def outer_places(net, run):
    """For each outer step recorded, how many tasks had begun before its row."""
    with divergence_probe.attach() as probe:
        run(net)
    begun, places = set(), []
    for block in probe.recording.blocks():
        for task in block.scalars["task"].tolist():
            if task >= 0:
                begun.add(task)
            else:
                places.append(len(begun))
    return places


def in_place(net, tasks=1, share=0.5):
    for _ in range(ROUNDS):
        start, ends = copy.deepcopy(net.state_dict()), []
        for _ in range(tasks):
            net.load_state_dict(start)
            train(net)
            ends.append(copy.deepcopy(net.state_dict()))
        net.load_state_dict(between(start, ends, share))


def on_copies(net, tasks=1, share=0.5):
    for _ in range(ROUNDS):
        learners = [copy.deepcopy(net) for _ in range(tasks)]
        for learner in learners:
            train(learner)
        with torch.no_grad():
            for place, parameter in enumerate(net.parameters()):
                ends = [list(learner.parameters())[place] for learner in learners]
                parameter.lerp_(torch.stack(ends).mean(0), share)


def functional(net, tasks=1, share=0.5):
    names = [name for name, _ in net.named_parameters()]
    for _ in range(ROUNDS):
        ends = []
        for _ in range(tasks):
            x = torch.randn(16, 2)
            fast = [p.clone() for p in net.parameters()]
            for _ in range(STEPS):
                made = torch.func.functional_call(net, dict(zip(names, fast, strict=True)), (x,))
                gradients = torch.autograd.grad(F.mse_loss(made, x[:, :1]), fast)
                fast = [w - 0.05 * g for w, g in zip(fast, gradients, strict=True)]
            ends.append(fast)
        with torch.no_grad():
            for place, parameter in enumerate(net.parameters()):
                parameter += share * (sum(end[place] for end in ends) / tasks - parameter)


@pytest.mark.parametrize("loop", [in_place, on_copies, functional])
@pytest.mark.parametrize(("tasks", "share"), [(1, 0.1), (1, 0.9), (3, 0.3), (3, 1.0)])
def test_the_base_moves_towards_what_its_tasks_came_to(loop, tasks, share):
    places = outer_places(network(), lambda net: loop(net, tasks, share))

    assert places == [tasks * number for number in range(1, ROUNDS + 1)]


def test_a_step_is_recorded_as_it_was_without_a_gradient():
    net = network()
    values = []

    def run(net):
        for _ in range(ROUNDS):
            values.append(net[0].weight.norm().item())
            on_copy = copy.deepcopy(net)
            train(on_copy)
            with torch.no_grad():
                for p, q in zip(net.parameters(), on_copy.parameters(), strict=True):
                    p += 0.5 * (q - p)
        values.append(net[0].weight.norm().item())

    with divergence_probe.attach() as probe:
        run(net)
    steps = probe.recording.steps()
    rows = steps[(steps["phase"] == "outer") & (steps["parameter"] == "0.weight")]

    assert rows["norm_before"].tolist() == pytest.approx(values[:-1], rel=1e-6)
    assert rows["norm_after"].tolist() == pytest.approx(values[1:], rel=1e-6)
    assert rows["gradient_norm"].isna().all()
    assert not {"BASE001", "MG001"} & {f.rule for f in probe.diagnosis.findings}


def continual(net):
    for _ in range(ROUNDS):
        train(net)


def partly_restored(net):
    for _ in range(ROUNDS):
        start = copy.deepcopy(net[0].state_dict())
        train(net)
        net[0].load_state_dict(start)


def elsewhere(net):
    """Weights are restored and then disturbed: no step towards anything."""
    for _ in range(ROUNDS):
        start = copy.deepcopy(net.state_dict())
        train(net)
        net.load_state_dict({n: v + 0.1 * torch.randn_like(v) for n, v in start.items()})


@pytest.mark.parametrize("loop", [continual, partly_restored, elsewhere])
def test_other_moves_are_no_outer_steps(loop):
    assert outer_places(network(), loop) == []


def test_an_average_may_be_weighted():
    def run(net):
        for _ in range(ROUNDS):
            start, ends = copy.deepcopy(net.state_dict()), []
            for _ in range(3):
                net.load_state_dict(start)
                train(net)
                ends.append(copy.deepcopy(net.state_dict()))
            a, b, c = ends
            net.load_state_dict({n: 0.5 * a[n] + 0.2 * b[n] + 0.3 * c[n] for n in start})

    assert outer_places(network(), run) == [3 * number for number in range(1, ROUNDS + 1)]


@pytest.mark.parametrize("when", [2, ROUNDS - 1])
def test_a_copy_that_is_adapted_in_between_is_a_task_of_its_own(when):
    def run(net):
        for number in range(ROUNDS):
            if number == when:
                for _ in range(2):
                    train(copy.deepcopy(net))
            start = copy.deepcopy(net.state_dict())
            train(net)
            net.load_state_dict(between(start, [net.state_dict()], 0.3))

    found = summary(network(), run)

    assert (found.tasks, found.outer_steps) == (ROUNDS + 2, ROUNDS)


def averaged_once(net):
    """Fine-tuned weights averaged with those before, and trained on."""
    start = copy.deepcopy(net.state_dict())
    train(net)
    net.load_state_dict(between(start, [net.state_dict()], 0.5))
    train(net, 2 * STEPS)


def damped(net):
    """Every single step goes half the way."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(6):
        start = copy.deepcopy(net.state_dict())
        train(net, 1, optimizer)
        net.load_state_dict(between(start, [net.state_dict()], 0.5))


def averaged_aside(net):
    """An average of the weights is kept next to them."""
    average = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(4):
        train(net, 2, optimizer)
        with torch.no_grad():
            for p, q in zip(average.parameters(), net.parameters(), strict=True):
                p.lerp_(q, 0.1)


@pytest.mark.parametrize("loop", [averaged_once, damped, averaged_aside])
def test_ordinary_training_stays_unobserved(loop):
    assert summary(network(), loop).tasks == 0


@pytest.mark.parametrize("width", [16, 300], ids=["small", "large"])
@pytest.mark.parametrize("copied", [True, False], ids=["copies", "in place"])
def test_a_part_of_a_model_adapts(width, copied):
    """A frozen layer, say: what is kept of the rest is one vector, or one each, on both sides."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 40), nn.Linear(40, 3))
    net[0].requires_grad_(False)
    kept = copy.deepcopy(net.state_dict())
    with divergence_probe.attach(net) as probe:
        for _ in range(6):
            net.load_state_dict(kept)
            learner = copy.deepcopy(net) if copied else net
            rest = [p for p in learner.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(rest, lr=0.1)
            for _ in range(5):
                optimizer.zero_grad()
                x, y = torch.randn(10, 8), torch.randint(0, 3, (10,))
                F.cross_entropy(learner(x), y).backward()
                optimizer.step()
    assert probe.failure is None
    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (6, 30)
