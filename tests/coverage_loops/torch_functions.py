"""``torch.func``: grad, grad_and_value, vjp, and vmap over tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vjp, vmap

from tests.coverage_loops.notes import RATE, ROUNDS, STEPS, TASKS, Net, Notes, batch, forward, named

Weights = dict[str, Tensor]


def _outer(notes: Notes, adapt: Callable[[Net, Weights, Tensor, Tensor], Weights]) -> None:
    """MAML around ``adapt``, which takes one step and gives the next weights."""
    net = Net()
    outer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(ROUNDS):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            fast: Weights = dict(net.named_parameters())
            for _ in range(STEPS):
                before = notes.values(fast)
                loss = F.mse_loss(functional_call(net, fast, (x,)), y)
                fast = adapt(net, fast, x, y)
                notes.step(loss, before, fast)
            F.mse_loss(functional_call(net, fast, (x,)), y).backward()
        notes.outer(named(net), outer.step)


def _loss(net: Net, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(functional_call(net, weights, (x,)), y)


def by_grad(net: Net, fast: Weights, x: Tensor, y: Tensor) -> Weights:
    gradients = grad(lambda weights: _loss(net, weights, x, y))(fast)
    return {name: p - RATE * gradients[name] for name, p in fast.items()}


def by_grad_and_value(net: Net, fast: Weights, x: Tensor, y: Tensor) -> Weights:
    gradients, _ = grad_and_value(lambda weights: _loss(net, weights, x, y))(fast)
    return {name: p - RATE * gradients[name] for name, p in fast.items()}


def by_vjp(net: Net, fast: Weights, x: Tensor, y: Tensor) -> Weights:
    value, pull_back = vjp(lambda weights: _loss(net, weights, x, y), fast)
    (gradients,) = pull_back(torch.ones_like(value))
    return {name: p - RATE * gradients[name] for name, p in fast.items()}


def with_aux(net: Net, fast: Weights, x: Tensor, y: Tensor) -> Weights:
    def loss_and_output(weights: Weights) -> tuple[Tensor, Tensor]:
        output = functional_call(net, weights, (x,))
        return F.mse_loss(output, y), output

    gradients, _ = grad(loss_and_output, has_aux=True)(fast)
    return {name: p - RATE * gradients[name] for name, p in fast.items()}


def several_arguments(net: Net, fast: Weights, x: Tensor, y: Tensor) -> Weights:
    def loss(first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
        return F.mse_loss(forward([first, first_bias, second, second_bias], x), y)

    gradients = grad(loss, argnums=(0, 1, 2, 3))(*fast.values())
    return {name: p - RATE * g for (name, p), g in zip(fast.items(), gradients, strict=True)}


def _reference(notes: Notes, net: Net, xs: Tensor, ys: Tensor) -> None:
    """What every task of the batch does by itself; run where no probe is watching."""
    for x, y in zip(xs, ys, strict=True):
        notes.task()
        fast: Weights = {n: p.detach().clone().requires_grad_() for n, p in named(net).items()}
        for _ in range(STEPS):
            loss = F.mse_loss(functional_call(net, fast, (x,)), y)
            before = notes.values(fast)
            gradients = torch.autograd.grad(loss, list(fast.values()))
            fast = {
                n: (p - RATE * g).detach().requires_grad_()
                for (n, p), g in zip(fast.items(), gradients, strict=True)
            }
            notes.step(loss, before, fast)


class Vmapped:
    """Tasks side by side in one vmap; the truth is noted before the probe is attached."""

    def __init__(self, inside: str) -> None:
        self._inside = inside

    def prepare(self, notes: Notes) -> None:
        """Run every task by itself."""
        self.net = Net()
        pairs = [batch() for _ in range(3)]
        self.xs = torch.stack([x for x, _ in pairs])
        self.ys = torch.stack([y for _, y in pairs])
        _reference(notes, self.net, self.xs, self.ys)

    def __call__(self, notes: Notes) -> None:
        net = self.net
        start: Weights = dict(net.named_parameters())

        def slopes(fast: Weights, x: Tensor, y: Tensor) -> Weights:
            return grad(lambda weights: _loss(net, weights, x, y))(fast)  # type: ignore[no-any-return]

        def step(fast: Weights, x: Tensor, y: Tensor) -> Weights:
            gradients = slopes(fast, x, y)
            return {name: p - RATE * gradients[name] for name, p in fast.items()}

        def adapt(x: Tensor, y: Tensor) -> Tensor:
            fast = start
            for _ in range(STEPS):
                fast = step(fast, x, y)
            return _loss(net, fast, x, y)

        if self._inside == "loop":
            vmap(adapt)(self.xs, self.ys).mean().backward()
            return
        fast = {name: p.expand(3, *p.shape) for name, p in start.items()}
        for _ in range(STEPS):
            if self._inside == "step":
                fast = vmap(step)(fast, self.xs, self.ys)
                continue
            gradients = vmap(slopes)(fast, self.xs, self.ys)
            fast = {name: p - RATE * gradients[name] for name, p in fast.items()}
        vmap(partial(_loss, net))(fast, self.xs, self.ys).mean().backward()


def cells() -> list[tuple[str, str, str, Any]]:
    """``(style, order, optimizer, loop)``."""
    styles = {
        "`grad`": by_grad,
        "`grad_and_value`": by_grad_and_value,
        "`vjp`": by_vjp,
        "`grad(has_aux=True)`": with_aux,
        "`grad(argnums=(0, 1, 2, 3))`": several_arguments,
    }
    found: list[tuple[str, str, str, Any]] = [
        (style, "second", "by hand", partial(_outer, adapt=adapt))
        for style, adapt in styles.items()
    ]
    for inside in ("loop", "step", "gradient"):
        style = f"`vmap` over tasks, {inside} inside"
        found.append((style, "second", "by hand", Vmapped(inside)))
    return found
