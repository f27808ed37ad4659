"""A model that loads another one's state is its copy, as a deep copy is."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

STEPS, ROUNDS = 3, 4


def network():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def train(net, steps=STEPS):
    x = torch.randn(16, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(x), x[:, :1] * x[:, 1:]).backward()
        optimizer.step()


def as_it_is(net):
    return net.state_dict()


def deep_copy(net):
    return copy.deepcopy(net.state_dict())


def clones(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def summary(run):
    gc.collect()  # the nets of tests before begin with the same values
    torch.manual_seed(0)
    net = network()  # alive until the end, as in a script
    with divergence_probe.attach() as probe:
        run(net)
    found = probe.diagnosis
    return (found.summary.tasks, found.summary.inner_steps, found.summary.outer_steps), {
        finding.rule for finding in found.findings
    }


@pytest.mark.parametrize("state", [as_it_is, deep_copy, clones])
@pytest.mark.parametrize("kept", [False, True], ids=["new learners", "one learner"])
def test_gradients_are_pointed_at_the_base(state, kept):
    """The way back from what the learner came to is handed to the outer optimizer."""

    def run(net):
        outer, learner = torch.optim.Adam(net.parameters(), lr=0.01), network()
        for _ in range(ROUNDS):
            learner = learner if kept else network()
            learner.load_state_dict(state(net))
            train(learner)
            for p, q in zip(net.parameters(), learner.parameters(), strict=True):
                p.grad = p.detach() - q.detach()
            outer.step()

    counts, found = summary(run)

    assert counts == (ROUNDS, ROUNDS * STEPS, ROUNDS)
    assert not found & {"OPT001", "BASE001"}


def test_members_of_a_population_take_over_each_others_weights():
    """Whose they are is trained by the same line, and is no base of theirs."""
    torch.manual_seed(0)
    members = [network() for _ in range(3)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01 * 2**i) for i, m in enumerate(members)]
    x = torch.randn(16, 2)

    def generation(net, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), x[:, :1] * x[:, 1:])
            loss.backward()
            optimizer.step()
        return loss.item()

    with divergence_probe.attach() as probe:
        for _ in range(6):
            scores = [generation(*pair) for pair in zip(members, optimizers, strict=True)]
            best, worst = scores.index(min(scores)), scores.index(max(scores))
            members[worst].load_state_dict(members[best].state_dict())
            optimizers[worst] = torch.optim.Adam(members[worst].parameters(), lr=0.02)

    assert probe.diagnosis.summary.outer_steps == 0
    assert not {f.rule for f in probe.diagnosis.findings if f.severity.name != "INFO"}


def test_clients_are_averaged():
    """Federated averaging: every client has a model of its own, and loads the server's."""

    def run(server):
        clients = [network() for _ in range(4)]
        for number in range(ROUNDS):
            picked = [clients[number % 4], clients[(number + 1) % 4]]
            for client in picked:
                client.load_state_dict(server.state_dict())
                train(client)
            a, b = (client.state_dict() for client in picked)
            server.load_state_dict({name: 0.3 * a[name] + 0.7 * b[name] for name in a})

    counts, found = summary(run)

    assert counts == (2 * ROUNDS, 2 * ROUNDS * STEPS, ROUNDS)
    assert "BASE001" not in found


def target(net):
    """A target network follows the one that is trained."""
    follower, x = network(), torch.randn(16, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(12):
        if step % 3 == 0:
            follower.load_state_dict(net.state_dict())
        optimizer.zero_grad()
        F.mse_loss(net(x), follower(x).detach() + 0.1).backward()
        optimizer.step()


def student(net):
    """One model begins with another's weights, and is trained."""
    other = network()
    other.load_state_dict(net.state_dict())
    train(other, 3 * STEPS)


@pytest.mark.parametrize("loop", [target, student])
def test_ordinary_training_stays_unobserved(loop):
    assert summary(loop)[0][0] == 0
