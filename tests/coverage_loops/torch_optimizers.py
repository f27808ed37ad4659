"""``torch.optim`` as the inner optimizer, on deep copies and in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tests.coverage_loops.notes import (
    NAMES,
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
        notes.outer(named(net), outer.step)


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
        notes.outer(named(net), outer.step)


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
        notes.outer(named(net), outer.step)


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
        notes.outer(named(net), outer.step)


def reptile(notes: Notes) -> None:
    """The base moves towards the weights each task ended with."""
    net = Net()
    notes.alive.append(net)
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
        notes.outer(named(net), partial(_move_towards, net, learner))


def _move_towards(net: Net, learner: Net) -> None:
    with torch.no_grad():
        for p, q in zip(net.parameters(), learner.parameters(), strict=True):
            p.add_(0.5 * (q - p))


def reptile_in_place(notes: Notes) -> None:
    """The same on one model: trained, then moved back half the way."""
    net = Net()
    notes.alive.append(net)
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
        between = {name: start[name] + 0.5 * (end[name] - start[name]) for name in start}
        ended = notes.values(named(net))
        notes.outer(named(net), partial(net.load_state_dict, between))
        assert notes.outer_steps[-1].before == ended
        notes.outer_steps[-1].before = notes.values({n: start[n] for n in NAMES})


def two_in_turn(notes: Notes, gradient: str, by_hand: bool) -> None:
    """One model: adapted by the inner optimizer (or by hand), put back, moved by the outer one.

    The outer gradient is the query's, the mean of those of two tasks, or the way back (Reptile).
    """
    net = Net(batch_norm=True)
    inner = torch.optim.SGD(net.parameters(), lr=RATE)
    outer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        start = copy.deepcopy(net.state_dict())
        total = [torch.zeros_like(p) for p in net.parameters()]
        for _ in range(1 if gradient == "query" else TASKS):
            notes.task()
            x, y = batch()
            for _ in range(STEPS):
                _adapt(notes, net, F.mse_loss(net(x), y), None if by_hand else inner)
            if gradient != "way back":
                net.zero_grad()
                F.mse_loss(net(x), y).backward()
            for t, name, p in zip(total, NAMES, net.parameters(), strict=True):
                t += start[name] - p.data if gradient == "way back" else p.grad
            _put_back(net, start, by_hand)
        if gradient != "query":
            for t, p in zip(total, net.parameters(), strict=True):
                p.grad = t / TASKS
        notes.outer(named(net), outer.step)


def _adapt(notes: Notes, net: Net, loss: torch.Tensor, inner: torch.optim.SGD | None) -> None:
    before = notes.values(named(net))
    net.zero_grad()
    loss.backward()
    if inner is not None:
        inner.step()
    else:
        for p in net.parameters():
            p.data -= RATE * p.grad.data
    notes.step(loss, before, named(net))


def _put_back(net: Net, start: dict[str, torch.Tensor], by_hand: bool) -> None:
    if not by_hand:
        net.load_state_dict(start)
        return
    for name, p in net.named_parameters():
        p.data.copy_(start[name])


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
    found += [
        (
            f"one model, outer gradient: {gradient}",
            "first",
            "by hand, Adam" if by_hand else "SGD, Adam",
            partial(two_in_turn, gradient=gradient, by_hand=by_hand),
        )
        for gradient in ("query", "queries' mean", "way back")
        for by_hand in (False, True)
    ]
    return found
