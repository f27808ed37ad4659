"""Tasks that are evaluated: what ran without a gradient, and what no outer step follows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import divergence_probe

TASKS = 6


def findings(probe: divergence_probe.Probe) -> dict[str, int]:
    return {found["rule"]: found["count"] for found in probe.diagnosis.to_dict()["findings"]}


def test_every_evaluated_task_is_judged_by_its_own_batch() -> None:
    """A query's forward, that no gradient is taken of, is not the next task's first."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()

    with divergence_probe.attach(net) as probe:
        for _ in range(TASKS):
            x, y = 3 * torch.randn(30, 8) + 10, torch.randint(0, 3, (30,))
            fast = {k: w.detach().requires_grad_() for k, w in net.named_parameters()}
            buffers = {k: b.clone() for k, b in net.named_buffers()}
            for _ in range(2):
                loss = F.cross_entropy(functional_call(net, {**fast, **buffers}, (x,)), y)
                slopes = torch.autograd.grad(loss, list(fast.values()))
                fast = {k: w - 0.01 * g for (k, w), g in zip(fast.items(), slopes, strict=True)}
            F.cross_entropy(functional_call(net, {**fast, **buffers}, (x,)), y)

    assert findings(probe)["BN001"] == TASKS


@pytest.mark.parametrize("averaged", [False, True])
def test_training_of_the_base_after_a_validation_is_no_query_of_it(averaged: bool) -> None:
    """All tasks run in eval mode; before each outer step the base itself is trained on.

    What is validated may be an average of its weights, kept in a model of its own.
    """
    torch.manual_seed(0)
    norms, dropout = nn.BatchNorm1d(16), nn.Dropout(0.2)
    net = nn.Sequential(nn.Linear(6, 16), norms, nn.ReLU(), dropout, nn.Linear(16, 3))
    outer = torch.optim.SGD(net.parameters(), lr=1e-2)
    mean = AveragedModel(net, use_buffers=True)

    def train() -> None:
        net.train()
        F.cross_entropy(net(torch.randn(64, 6)), torch.randint(0, 3, (64,))).backward()

    def adapt(net: nn.Module, differentiably: bool) -> torch.Tensor:
        net.eval()
        x, y, fast = torch.randn(64, 6), torch.randint(0, 3, (64,)), dict(net.named_parameters())
        for _ in range(3):
            loss = F.cross_entropy(functional_call(net, fast, (x,)), y)
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=differentiably)
            fast = {k: w - 0.05 * g for (k, w), g in zip(fast.items(), slopes, strict=True)}
        return F.cross_entropy(functional_call(net, fast, (x,)), y)

    with divergence_probe.attach(net) as probe:
        for _ in range(60):
            outer.zero_grad()
            train()
            outer.step()
        for _ in range(4):
            outer.zero_grad()
            train()
            adapt(net, differentiably=True).backward()
            outer.step()
            mean.update_parameters(net)
            adapt(mean.module if averaged else net, differentiably=False)

    assert "MODE001" not in findings(probe)


def test_dropout_is_seen_in_tasks_that_come_after_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)

    with divergence_probe.attach(net) as probe:
        for task in range(2 * TASKS):
            x = torch.randn(20, 6)
            fast = dict(net.named_parameters())
            for _ in range(2):
                loss = F.mse_loss(functional_call(net, fast, (x,)), x[:, :1])
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {k: w - 0.01 * g for (k, w), g in zip(fast.items(), slopes, strict=True)}
            query = F.mse_loss(functional_call(net, fast, (x,)), x[:, :1])
            if task < TASKS:
                outer.zero_grad()
                query.backward()
                outer.step()

    assert findings(probe)["MODE003"] == TASKS


def test_an_optimizer_that_was_given_the_originals_is_told_of() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 1)

    with divergence_probe.attach(net) as probe:
        for _ in range(TASKS):
            x, learner = torch.randn(20, 4), copy.deepcopy(net)
            inner = torch.optim.SGD(net.parameters(), lr=0.02)
            for _ in range(5):
                inner.zero_grad()
                F.mse_loss(learner(x), x[:, :1]).backward()
                inner.step()

    assert findings(probe) == {"LR004": TASKS}


def federated(rounds: int) -> None:
    server = nn.Linear(10, 4)
    for _ in range(rounds):
        states = []
        for _ in range(3):
            client, x = copy.deepcopy(server), torch.randn(30, 10)
            optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
            for _ in range(4):
                optimizer.zero_grad()
                F.mse_loss(client(x), x[:, :4]).backward()
                optimizer.step()
            states.append(client.state_dict())
        mean = {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
        server.load_state_dict(mean)


def test_the_last_average_is_seen_though_its_base_is_gone_at_the_end() -> None:
    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        federated(rounds=5)

    steps = probe.recording.steps()
    outer = steps[(steps.phase == "outer") & (steps.parameter == "weight")]
    assert len(outer) == 5
    assert probe.diagnosis.to_dict()["summary"]["tasks"] == 15
