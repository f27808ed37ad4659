"""``torch.optim`` as the inner optimizer, on deep copies and in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tests.coverage_loops.notes import (
    RATE,
    STEPS,
    TASKS,
    Net,
    Notes,
    batch,
    first_order_outer,
    named,
)

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(torch.optim.SGD, lr=RATE),
    "SGD, momentum": partial(torch.optim.SGD, lr=RATE, momentum=0.9, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=RATE),
    "AdamW": partial(torch.optim.AdamW, lr=RATE),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=RATE),
    "Adam, not foreach": partial(torch.optim.Adam, lr=RATE, foreach=False),
}


def on_deep_copies(notes: Notes, make: Callable[..., Any]) -> None:
    """First-order MAML with a fresh optimizer for each task."""
    net = Net(batch_norm=True)
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        for _ in range(TASKS):
            notes.task()
            learner = copy.deepcopy(net)
            optimizer = make(learner.parameters())
            x, y = batch()
            for _ in range(STEPS):
                loss = F.mse_loss(learner(x), y)
                before = notes.values(named(learner))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                notes.step(loss, before, named(learner))
            first_order_outer(net, learner, F.mse_loss(learner(x), y))
        outer.step()


def with_closure(notes: Notes, make: Callable[..., Any]) -> None:
    """The optimizer takes the gradient itself, through a closure."""
    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        for _ in range(TASKS):
            notes.task()
            learner = copy.deepcopy(net)
            optimizer = make(learner.parameters())
            x, y = batch()

            def closure(
                learner: Net = learner, optimizer: Any = optimizer, x: Any = x, y: Any = y
            ) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(learner(x), y)
                loss.backward()
                return loss

            for _ in range(STEPS):
                before = notes.values(named(learner))
                loss = optimizer.step(closure)
                notes.step(loss, before, named(learner))
            first_order_outer(net, learner, F.mse_loss(learner(x), y))
        outer.step()


def two_optimizers(notes: Notes) -> None:
    """One backward, then one optimizer for the body and one for the head."""
    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        for _ in range(TASKS):
            notes.task()
            learner = copy.deepcopy(net)
            body = torch.optim.SGD(learner.first.parameters(), lr=RATE)
            head = torch.optim.Adam(learner.second.parameters(), lr=RATE)
            x, y = batch()
            for _ in range(STEPS):
                loss = F.mse_loss(learner(x), y)
                before = notes.values(named(learner))
                learner.zero_grad()
                loss.backward()
                body.step()
                head.step()
                notes.step(loss, before, named(learner))
            first_order_outer(net, learner, F.mse_loss(learner(x), y))
        outer.step()


def accumulated(notes: Notes) -> None:
    """Two backwards, one step."""
    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        for _ in range(TASKS):
            notes.task()
            learner = copy.deepcopy(net)
            optimizer = torch.optim.SGD(learner.parameters(), lr=RATE)
            for _ in range(STEPS):
                before = notes.values(named(learner))
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                for _ in range(2):
                    x, y = batch()
                    loss = F.mse_loss(learner(x), y)
                    loss.backward()
                    total += loss.detach()
                optimizer.step()
                notes.step(total, before, named(learner))
            first_order_outer(net, learner, F.mse_loss(learner(x), y))
        outer.step()


def reptile(notes: Notes) -> None:
    """The base moves towards the weights each task ended with."""
    net = Net()
    for _ in range(4):
        notes.task()
        learner = copy.deepcopy(net)
        optimizer = torch.optim.SGD(learner.parameters(), lr=RATE)
        x, y = batch()
        for _ in range(STEPS):
            loss = F.mse_loss(learner(x), y)
            before = notes.values(named(learner))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            notes.step(loss, before, named(learner))
        with torch.no_grad():
            for p, q in zip(net.parameters(), learner.parameters(), strict=True):
                p.add_(0.5 * (q - p))


def reptile_in_place(notes: Notes) -> None:
    """The same on one model: trained, then moved back half the way."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(4):
        notes.task()
        start = copy.deepcopy(net.state_dict())
        x, y = batch()
        for _ in range(STEPS):
            loss = F.mse_loss(net(x), y)
            before = notes.values(named(net))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            notes.step(loss, before, named(net))
        end = net.state_dict()
        net.load_state_dict({name: start[name] + 0.5 * (end[name] - start[name]) for name in start})


def cells() -> list[tuple[str, str, str, Callable[[Notes], None]]]:
    """``(style, order, optimizer, loop)``."""
    found: list[tuple[str, str, str, Callable[[Notes], None]]] = [
        ("deep copy", "first", name, partial(on_deep_copies, make=make))
        for name, make in OPTIMIZERS.items()
    ]
    lbfgs = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    found += [
        ("closure", "first", "LBFGS", partial(with_closure, make=lbfgs)),
        ("closure", "first", "SGD", partial(with_closure, make=OPTIMIZERS["SGD"])),
        ("two optimizers", "first", "SGD, Adam", two_optimizers),
        ("two backwards, one step", "first", "SGD", accumulated),
        ("Reptile, deep copy", "first", "SGD", reptile),
        ("Reptile, in place", "first", "SGD", reptile_in_place),
    ]
    return found
