"""Two optimizers of the same weights: which is the outer one, and where neither is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

STEPS, ROUNDS = 3, 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(net):
    x = torch.randn(16, 2)
    return F.mse_loss(net(x), x[:, :1] * x[:, 1:])


def backward(net):
    """One line for every backward: what is known of it serves inner and outer gradients."""
    net.zero_grad()
    loss_of(net).backward()


def diagnosed(net, run):
    with divergence_probe.attach() as probe:
        run(net)
    found = probe.diagnosis
    return found.summary, {f.rule for f in found.findings if f.severity.name != "INFO"}


def step_with(outer, net, gradients):
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient
    outer.step()


def by_state(net, start):
    net.load_state_dict(start)


def by_data(net, start):
    """Torch counts no change of memory that is written through ``.data``."""
    for name, parameter in net.named_parameters():
        parameter.data.copy_(start[name])


def by_copy(net, start):
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(start[name])


def with_optimizer(net):
    return torch.optim.Adam(net.parameters(), lr=0.01)


@pytest.mark.parametrize("restore", [by_state, by_data, by_copy])
@pytest.mark.parametrize("fresh", [False, True], ids=["one inner", "an inner for each task"])
def test_first_order_maml_on_one_model(restore, fresh):
    def run(net):
        outer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        inner = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(ROUNDS):
            start = copy.deepcopy(net.state_dict())
            inner = torch.optim.SGD(net.parameters(), lr=0.05) if fresh else inner
            for _ in range(STEPS):
                backward(net)
                inner.step()
            backward(net)
            restore(net, start)
            outer.step()

    summary, found = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS
    assert not found & {"OPT001", "BASE001"}


def test_gradients_handed_to_the_outer_optimizer_of_one_model():
    """They are those of a ``grad()`` at the adapted weights, which are put back before the step."""

    def run(net):
        outer = with_optimizer(net)
        for _ in range(ROUNDS):
            start = copy.deepcopy(net.state_dict())
            inner = torch.optim.SGD(net.parameters(), lr=0.05)
            for _ in range(STEPS):
                backward(net)
                inner.step()
            gradients = torch.autograd.grad(loss_of(net), list(net.parameters()))
            net.load_state_dict(start)
            step_with(outer, net, gradients)

    summary, _ = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS


@pytest.mark.parametrize("fresh", [False, True], ids=["one inner", "an inner for each task"])
def test_a_worker_that_takes_over_the_values_of_the_base(fresh):
    """It is no copy of it by any call: its values tell, once gradients were handed to the base."""

    def run(net):
        worker = copy.deepcopy(network())
        for parameter in worker.parameters():
            nn.init.normal_(parameter)
        outer, inner = with_optimizer(net), torch.optim.SGD(worker.parameters(), lr=0.05)
        for _ in range(ROUNDS):
            with torch.no_grad():
                for own, base in zip(worker.parameters(), net.parameters(), strict=True):
                    own.copy_(base)
            inner = torch.optim.SGD(worker.parameters(), lr=0.05) if fresh else inner
            for _ in range(STEPS):
                backward(worker)
                inner.step()
            gradients = torch.autograd.grad(loss_of(worker), list(worker.parameters()))
            step_with(outer, net, gradients)

    summary, _ = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS - 1  # (before the first one nothing tells the two apart)


def test_copies_that_are_adapted_together_with_a_head_of_their_tasks_own():
    """Made of each class's mean, it has no base; the rest is a copy of one all the same."""

    def run(net):
        outer = with_optimizer(net)
        for _ in range(ROUNDS):
            learner = copy.deepcopy(net)
            head = torch.randn(3, 1, requires_grad=True)
            inner = torch.optim.SGD([*learner.parameters(), head], lr=0.05)
            for _ in range(STEPS):
                inner.zero_grad()
                (loss_of(learner) + head.square().sum()).backward()
                inner.step()
            gradients = torch.autograd.grad(loss_of(learner), list(learner.parameters()))
            step_with(outer, net, gradients)

    summary, found = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS
    assert not found & {"OPT001", "BASE001"}


def test_first_order_maml_by_hand_with_an_outer_optimizer():
    def run(net):
        outer = with_optimizer(net)
        for _ in range(ROUNDS):
            start = copy.deepcopy(net.state_dict())
            for _ in range(STEPS):
                backward(net)
                with torch.no_grad():
                    for p in net.parameters():
                        p -= 0.05 * p.grad
            backward(net)
            by_data(net, start)
            outer.step()

    summary, _ = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS


def test_the_query_belongs_to_its_task():
    def run(net):
        inner, outer = torch.optim.SGD(net.parameters(), lr=0.05), with_optimizer(net)
        for _ in range(ROUNDS):
            start = copy.deepcopy(net.state_dict())
            for _ in range(STEPS):
                backward(net)
                inner.step()
            queries.append(loss_of(net))
            net.zero_grad()
            queries[-1].backward()
            by_copy(net, start)
            outer.step()

    queries, net = [], network()
    with divergence_probe.attach() as probe:
        run(net)
    steps = probe.recording.steps()
    rows = steps[steps["phase"] == "query"].groupby("task")["loss"].first()

    assert rows.tolist() == pytest.approx([query.item() for query in queries], rel=1e-6)


def two_of_one_training(net):
    first, second = torch.optim.SGD(net.parameters(), lr=0.05), with_optimizer(net)
    for step in range(12):
        backward(net)
        (first if step % 4 else second).step()


def restored_once(net):
    """A checkpoint is gone back to, and trained on with another optimizer."""
    start = copy.deepcopy(net.state_dict())
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.05), with_optimizer(net)):
        net.load_state_dict(start)
        for _ in range(4):
            backward(net)
            optimizer.step()


def sharpness_aware(net):
    """The gradient is taken at disturbed weights, by the one optimizer there is."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(8):
        backward(net)
        moves = [0.05 * p.grad.sign() for p in net.parameters()]
        with torch.no_grad():
            for p, move in zip(net.parameters(), moves, strict=True):
                p += move
        backward(net)
        with torch.no_grad():
            for p, move in zip(net.parameters(), moves, strict=True):
                p -= move
        optimizer.step()


def evolution(net):
    """Gradients are estimated without a backward, of what random changes do."""
    optimizer = with_optimizer(net)
    for _ in range(8):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(4):
            noise = [0.05 * torch.randn_like(p) for p in net.parameters()]
            with torch.no_grad():
                for p, n in zip(net.parameters(), noise, strict=True):
                    p += n
                loss = loss_of(net)
                for p, n in zip(net.parameters(), noise, strict=True):
                    p -= n
                    p.grad += loss * n
        optimizer.step()


@pytest.mark.parametrize("loop", [two_of_one_training, restored_once, sharpness_aware, evolution])
def test_no_outer_step_where_weights_are_moved_by_their_own_gradient(loop):
    summary, _ = diagnosed(network(), loop)

    assert summary.outer_steps == 0


class SharpnessAware:
    """Up the gradient, the gradient there, back again, and down with that."""

    def __init__(self, parameters, exactly):
        self.parameters, self.exactly = list(parameters), exactly
        self.base = torch.optim.SGD(self.parameters, lr=0.05)

    @torch.no_grad()
    def disturb(self):
        self.old = [p.detach().clone() for p in self.parameters]
        self.moves = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in self.parameters]
        for p, move in zip(self.parameters, self.moves, strict=True):
            p.add_(move)

    @torch.no_grad()
    def step(self):
        for p, old, move in zip(self.parameters, self.old, self.moves, strict=True):
            if self.exactly:
                p.data = old
            else:
                p.sub_(move)
        self.base.step()


@pytest.mark.parametrize("exactly", [True, False], ids=["restored", "subtracted"])
def test_sharpness_aware_inner_steps(exactly):
    """Weights that are disturbed by hand and put back begin no task and are no step."""

    def run(net):
        outer = with_optimizer(net)
        for _ in range(ROUNDS):
            learner = copy.deepcopy(net)
            inner = SharpnessAware(learner.parameters(), exactly)
            for _ in range(STEPS):
                backward(learner)
                inner.disturb()
                backward(learner)
                inner.step()
            gradients = torch.autograd.grad(loss_of(learner), list(learner.parameters()))
            step_with(outer, net, gradients)

    summary, found = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS
    assert "BASE001" not in found


def test_sharpness_aware_adaptation_of_weights_that_are_restored():
    """One optimizer is no outer one beside itself, although its gradient is taken elsewhere."""

    def run(net):
        start = copy.deepcopy(net.state_dict())
        inner = SharpnessAware(net.parameters(), exactly=True)
        for _ in range(ROUNDS):
            net.load_state_dict(start)
            for _ in range(STEPS):
                backward(net)
                inner.disturb()
                backward(net)
                inner.step()

    summary, _ = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == 0


@pytest.mark.parametrize("own", [True, False], ids=["in place", "on copies"])
def test_an_adversarys_steps_up_are_steps(own):
    def run(net):
        outer = with_optimizer(net)
        for _ in range(ROUNDS):
            start = copy.deepcopy(net.state_dict())
            learner = net if own else copy.deepcopy(net)
            for _ in range(STEPS):
                backward(learner)
                with torch.no_grad():
                    for p in learner.parameters():
                        p += 0.01 * p.grad
            backward(learner)
            gradients = [p.grad for p in learner.parameters()]
            net.load_state_dict(start)
            step_with(outer, net, gradients)

    summary, _ = diagnosed(network(), run)

    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS
