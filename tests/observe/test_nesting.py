"""What is an inner loop, and what only looks like one."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

STEPS = 4


def watched(run):
    """The summary of what was recorded of ``run()``."""
    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        run()
    return probe.diagnosis.summary.tasks, probe.diagnosis.summary.inner_steps


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch():
    x = torch.randn(16, 4)
    return x, (x[:, 0] > 0).long()


def train(net, steps=STEPS, penalty=lambda: 0.0):
    x, y = batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y) + penalty()).backward()
        optimizer.step()
    return optimizer


def unpickled(net):
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
@pytest.mark.parametrize(("copies", "expected"), [(1, (0, 0)), (3, (3, 3 * STEPS))])
def test_one_copy_is_fine_tuned_and_several_are_adapted(copied, copies, expected):
    base = network()
    alive = []  # as in a script, until the end

    def run():
        for _ in range(copies):
            learner = copied(base)
            alive.append((learner, train(learner)))

    assert watched(run) == expected


@pytest.mark.parametrize("zeros", [False, True])
def test_models_of_one_file_are_no_copies_of_each_other(zeros):
    """An ensemble; and models that begin at zeros, as any other may."""
    base = network()
    if zeros:
        for parameter in base.parameters():
            nn.init.zeros_(parameter)
    file, nets = pickle.dumps(base), []
    if not zeros:
        del base

    def run():
        nets.extend(pickle.loads(file) for _ in range(3))
        for net in nets:
            train(net)

    assert watched(run) == (0, 0)


@pytest.mark.parametrize("moved", [False, True])
def test_phases_of_one_training_are_inner_loops_where_weights_move_between(moved):
    """Reptile moves them; a new optimizer for every phase does not."""
    net = network()

    def run():
        for _ in range(4):
            start = [p.detach().clone() for p in net.parameters()]
            train(net)
            with torch.no_grad():
                for p, before in zip(net.parameters(), start, strict=True):
                    p.lerp_(before, 0.5 if moved else 0.0)

    tasks, _ = watched(run)
    assert bool(tasks) is moved


def importances(net):
    """The squared gradients of elastic weight consolidation."""
    x, y = batch()
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return [p.grad.detach() ** 2 for p in net.parameters()]


def test_a_penalty_made_of_squared_gradients_is_no_update():
    net = network()

    def run():
        train(net)
        for _ in range(3):
            weights, stars = importances(net), [p.detach().clone() for p in net.parameters()]

            def penalty(weights=weights, stars=stars):
                zipped = zip(net.parameters(), weights, stars, strict=True)
                return sum((w * (p - star) ** 2).sum() for p, w, star in zipped)

            train(net, penalty=penalty)

    assert watched(run) == (0, 0)


def test_importances_collected_along_the_way_are_no_update():
    """Synaptic intelligence: gradient times the way a weight has come."""
    net = network()
    old = [p.detach().clone() for p in net.parameters()]
    collected = [torch.zeros_like(p) for p in net.parameters()]

    def run():
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(8):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for p, start, omega in zip(net.parameters(), old, collected, strict=True):
                omega.add_(-p.grad * (p.detach() - start))
            optimizer.step()

    assert watched(run) == (0, 0)


@pytest.mark.parametrize("differentiable", [True, False])
def test_one_step_on_weights_that_are_only_multiplied_is_an_update(differentiable):
    scale, shift = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([scale, shift], lr=0.01)

    def run():
        for _ in range(3):
            x, y = torch.randn(10, 3), torch.randn(10, 3)
            loss = F.mse_loss(x * scale + shift, y)
            grads = torch.autograd.grad(loss, (scale, shift), create_graph=differentiable)
            a, b = (p - 0.1 * g for p, g in zip((scale, shift), grads, strict=True))
            optimizer.zero_grad()
            F.mse_loss(x * a + b, y).backward()
            optimizer.step()

    assert watched(run) == (3, 3)


@pytest.mark.parametrize(("games", "expected"), [(1, (0, 0)), (3, (12, 72))])
def test_players_of_weights_that_are_merely_alike_step_beside_each_other(games, expected):
    def play():
        players = [nn.Parameter(torch.zeros(5)) for _ in range(4)]
        optimizers = [torch.optim.Adam([player], lr=0.1) for player in players]
        for _ in range(6):
            aim = torch.randn(5)  # of all of them: each comes to where another one was
            for player, optimizer in zip(players, optimizers, strict=True):
                optimizer.zero_grad()
                (player - aim).pow(2).sum().backward()
                optimizer.step()

    assert watched(lambda: [play() for _ in range(games)]) == expected


def test_threads_that_adapt_copies_at_the_same_lines_leave_each_other_alone():
    base = network()
    outer = torch.optim.SGD(base.parameters(), lr=0.1)
    x, y = batch()

    def adapt(_):
        learner = copy.deepcopy(base)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(learner(x), y).backward()
            optimizer.step()
        return torch.autograd.grad(F.cross_entropy(learner(x), y), list(learner.parameters()))

    def run():
        for _ in range(3):
            with ThreadPoolExecutor(2) as pool:
                gradients = list(pool.map(adapt, range(6)))
            for parameter, *own in zip(base.parameters(), *gradients, strict=True):
                parameter.grad = sum(own) / len(own)
            outer.step()

    assert watched(run) == (18, 18 * STEPS)


@pytest.mark.parametrize("copies", [2, 4])
def test_copies_that_are_adapted_step_by_step_in_turn_are_tasks(copies):
    base = network()
    outer = torch.optim.SGD(base.parameters(), lr=0.1)

    def run():
        for _ in range(3):
            learners = [copy.deepcopy(base) for _ in range(copies)]
            optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in learners]
            for _ in range(STEPS):
                for learner, optimizer in zip(learners, optimizers, strict=True):
                    x, y = batch()
                    optimizer.zero_grad()
                    F.cross_entropy(learner(x), y).backward()
                    optimizer.step()
            gradients = []
            for learner in learners:
                x, y = batch()
                query = F.cross_entropy(learner(x), y)
                gradients.append(torch.autograd.grad(query, list(learner.parameters())))
            for parameter, *own in zip(base.parameters(), *gradients, strict=True):
                parameter.grad = sum(own) / copies
            outer.step()

    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        run()
    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.outer_steps) == (3 * copies, 3)
    assert summary.inner_steps == 3 * copies * STEPS
    steps = probe.recording.steps()
    assert steps[steps["phase"] == "query"]["task"].nunique() == 3 * copies


def loss_with(net, weights):
    """Of a batch, by ``net`` with other weights."""
    x, y = batch()
    names = [name for name, _ in net.named_parameters()]
    output = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,))
    return F.cross_entropy(output, y)


def test_weights_that_are_adapted_step_by_step_in_turn_are_tasks_once_that_is_known():
    net = network()
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = functools.partial(loss_with, net)

    def run():
        for _ in range(4):
            fasts = [list(net.parameters()) for _ in range(3)]
            for _ in range(STEPS):
                for i, fast in enumerate(fasts):
                    gradients = torch.autograd.grad(loss(fast), fast, create_graph=True)
                    fasts[i] = [w - 0.1 * g for w, g in zip(fast, gradients, strict=True)]
            outer.zero_grad()
            sum(map(loss, fasts)).backward()
            outer.step()

    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        run()
    assert probe.diagnosis.verdict == "healthy"
    assert any("in turn" in reason for reason in probe.diagnosis.summary.incomplete)
    tasks = probe.recording.tasks()
    assert list(tasks["steps"])[-9:] == [STEPS] * 9  # of all but the first outer step
    assert 12 * STEPS - probe.diagnosis.summary.inner_steps < 6


def test_tasks_of_a_step_whose_results_are_kept_for_later_throw_nothing_away():
    net = network()
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = functools.partial(loss_with, net)

    def adapt():
        weights = list(net.parameters())
        gradients = torch.autograd.grad(loss(weights), weights, create_graph=True)
        return [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]

    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        for _ in range(6):
            adapted = [adapt() for _ in range(4)]
            outer.zero_grad()
            sum(map(loss, adapted)).backward()
            outer.step()
    assert probe.diagnosis.verdict == "healthy"
    assert not probe.diagnosis.findings
    assert any("kept for later" in reason for reason in probe.diagnosis.summary.incomplete)
    assert (probe.diagnosis.summary.tasks, probe.diagnosis.summary.inner_steps) == (21, 21)
