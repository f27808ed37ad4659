"""higher, TorchOpt, learn2learn and betty: small loops with each of their ways to step."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.coverage_loops.notes import NAMES, RATE, STEPS, TASKS, Net, Notes, batch, forward, named

Loop = Callable[[Notes], None]
Found = list[tuple[str, str, str, Loop]]


def _higher_loop(
    notes: Notes, make: Callable[..., Any], context: Callable[..., Any], leaves_graph: bool
) -> None:
    net = Net(batch_norm=True)
    inner = make(net.parameters())
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            with context(net, inner) as (fast, stepper):
                for _ in range(STEPS):
                    loss = F.mse_loss(fast(x), y)
                    before = notes.values(dict(zip(NAMES, fast.parameters(), strict=True)))
                    stepper.step(loss)
                    notes.step(loss, before, dict(zip(NAMES, fast.parameters(), strict=True)))
                query = F.mse_loss(fast(x), y)
                if leaves_graph:
                    query.backward()
        if leaves_graph:
            notes.outer(named(net), outer.step)


class _Patched:
    """``monkeypatch`` with ``get_diff_optim`` or ``create_diff_optim``, in a ``with``."""

    def __init__(self, create: bool, net: nn.Module, inner: torch.optim.Optimizer) -> None:
        import higher

        self.fast = higher.monkeypatch(net, copy_initial_weights=False)
        if create:
            self.stepper = higher.optim.get_diff_optim(
                torch.optim.SGD(net.parameters(), lr=RATE), net.parameters(), fmodel=self.fast
            )
            self.stepper = higher.create_diff_optim(
                torch.optim.SGD, {"lr": RATE}, params=list(net.parameters()), fmodel=self.fast
            )
        else:
            self.stepper = higher.get_diff_optim(inner, net.parameters(), fmodel=self.fast)

    def __enter__(self) -> tuple[Any, Any]:
        return self.fast, self.stepper

    def __exit__(self, *error: object) -> None: ...


def _higher() -> Found:
    import higher

    optimizers: dict[str, Callable[..., Any]] = {
        "SGD": partial(torch.optim.SGD, lr=RATE),
        "SGD, momentum": partial(torch.optim.SGD, lr=RATE, momentum=0.9, weight_decay=0.01),
        "Adam": partial(torch.optim.Adam, lr=0.01, eps=1e-3),
    }
    found: Found = []
    for name, make in optimizers.items():
        for tracked in (True, False):
            for copied in (True, False):
                context = partial(
                    higher.innerloop_ctx, track_higher_grads=tracked, copy_initial_weights=copied
                )
                style = f"`innerloop_ctx`, weights {'copied' if copied else 'shared'}"
                loop = partial(
                    _higher_loop, make=make, context=context, leaves_graph=tracked and not copied
                )
                found.append((style, "second" if tracked else "first", name, loop))
    sgd = optimizers["SGD"]
    for create, style in ((False, "`get_diff_optim`"), (True, "`create_diff_optim`")):
        loop = partial(_higher_loop, make=sgd, context=partial(_Patched, create), leaves_graph=True)
        found.append((f"`monkeypatch`, {style}", "second", "SGD", loop))
    return found


def _meta_optimizer(notes: Notes, make: Callable[..., Any], by: str) -> None:
    import torchopt

    net = Net(batch_norm=True)
    base = named(net)  # what the outer optimizer moves: a state by copy is put back as clones
    inner = make(net)
    outer = torchopt.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        weights = torchopt.extract_state_dict(net, by=by, detach_buffers=True)
        state = torchopt.extract_state_dict(inner, by=by)
        queries = []
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            for _ in range(STEPS):
                loss = F.mse_loss(net(x), y)
                before = notes.values(named(net))
                inner.step(loss)
                notes.step(loss, before, named(net))
            queries.append(F.mse_loss(net(x), y))
            torchopt.recover_state_dict(net, weights)
            torchopt.recover_state_dict(inner, state)
        outer.zero_grad()
        torch.stack(queries).mean().backward()
        notes.outer(base, outer.step)
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)


def _functional_optimizer(notes: Notes, make: Callable[..., Any], second: bool) -> None:
    import torchopt

    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    inner = make()
    for _ in range(2):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            fast = tuple(net.parameters())
            state = inner.init(fast)
            for _ in range(STEPS):
                loss = F.mse_loss(forward(fast, x), y)
                before = notes.values(fast)
                gradients = torch.autograd.grad(loss, fast, create_graph=second)
                updates, state = inner.update(gradients, state, params=fast, inplace=False)
                fast = torchopt.apply_updates(fast, updates, inplace=False)
                notes.step(loss, before, fast)
            F.mse_loss(forward(fast, x), y).backward()
        notes.outer(named(net), outer.step)


def _wrapped_functional(notes: Notes) -> None:
    import torchopt

    net = Net()
    outer = torchopt.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            fast = tuple(net.parameters())
            inner = torchopt.FuncOptimizer(torchopt.adam(lr=RATE))
            for _ in range(STEPS):
                loss = F.mse_loss(forward(fast, x), y)
                before = notes.values(fast)
                fast = inner.step(loss, fast)
                notes.step(loss, before, fast)
            F.mse_loss(forward(fast, x), y).backward()
        notes.outer(named(net), outer.step)


def _functional_in_torch_func(notes: Notes) -> None:
    import torchopt

    net = Net()
    inner = torchopt.sgd(lr=RATE, momentum=0.9)
    for _ in range(TASKS):
        notes.task()
        x, y = batch()
        fast = {n: p.detach().clone() for n, p in named(net).items()}
        state = inner.init(fast)
        for _ in range(STEPS):
            before = notes.values(fast)
            gradients, loss = torch.func.grad_and_value(
                lambda w, x=x, y=y: F.mse_loss(torch.func.functional_call(net, w, (x,)), y)
            )(fast)
            updates, state = inner.update(gradients, state, params=fast, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
            notes.step(loss, before, fast)


def _torchopt() -> Found:
    import torchopt

    metas: dict[str, Callable[..., Any]] = {
        "MetaSGD": partial(torchopt.MetaSGD, lr=RATE),
        "MetaSGD, momentum": partial(
            torchopt.MetaSGD, lr=RATE, momentum=0.9, moment_requires_grad=True
        ),
        "MetaAdam": partial(torchopt.MetaAdam, lr=RATE, eps_root=1e-8),
        "MetaAdam, accelerated": partial(torchopt.MetaAdam, lr=RATE, use_accelerated_op=True),
        "MetaAdamW": partial(torchopt.MetaAdamW, lr=RATE, eps_root=1e-8),
        "MetaRMSProp": partial(torchopt.MetaRMSProp, lr=0.01),
        "MetaAdaGrad": partial(torchopt.MetaAdaGrad, lr=RATE),
    }
    found: Found = [
        (
            f"`MetaOptimizer`, state by {by}",
            "second",
            name,
            partial(_meta_optimizer, make=make, by=by),
        )
        for name, make in metas.items()
        for by in ("reference", "copy")
    ]
    plain: dict[str, Callable[..., Any]] = {
        "sgd": partial(torchopt.sgd, lr=RATE),
        "sgd, momentum, decay": partial(torchopt.sgd, lr=RATE, momentum=0.9, weight_decay=0.1),
        "adam": partial(torchopt.adam, lr=RATE, eps_root=1e-8),
        "adam, accelerated": partial(torchopt.adam, lr=RATE, use_accelerated_op=True),
        "adamw": partial(torchopt.adamw, lr=RATE, eps_root=1e-8),
        "rmsprop": partial(torchopt.rmsprop, lr=0.01),
    }
    for name, make in plain.items():
        for second in (False, True):
            loop = partial(_functional_optimizer, make=make, second=second)
            found.append(("functional", "second" if second else "first", name, loop))
    found.append(("`FuncOptimizer`", "second", "adam", _wrapped_functional))
    found.append(("functional, `torch.func`", "first", "sgd, momentum", _functional_in_torch_func))
    return found


def _learners(notes: Notes, make: Callable[..., Any], nested: bool = False) -> None:
    net = Net(batch_norm=True)
    learner = make(net)
    outer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    for _ in range(2):
        outer.zero_grad()
        for _ in range(TASKS):
            x, y = batch()
            clone = learner.clone()
            _adapt(notes, clone, x, y)
            if nested:
                clone = clone.clone()
                _adapt(notes, clone, x, y)
            F.mse_loss(clone(x), y).backward()
        notes.outer(named(net), outer.step)


def _adapt(notes: Notes, clone: Any, x: Tensor, y: Tensor) -> None:
    notes.task()
    for _ in range(STEPS):
        loss = F.mse_loss(clone(x), y)
        before = notes.values(named(clone.module))
        clone.adapt(loss)
        notes.step(loss, before, named(clone.module))


def _learn2learn() -> Found:
    import learn2learn as l2l

    def transform(parameter: Tensor) -> nn.Module:
        return l2l.optim.ModuleTransform(l2l.nn.Scale)(parameter)

    found: Found = []
    for first in (False, True):
        order = "first" if first else "second"
        makes: dict[str, Callable[..., Any]] = {
            "MAML": partial(l2l.algorithms.MAML, lr=RATE, first_order=first),
            "MetaSGD": partial(l2l.algorithms.MetaSGD, lr=RATE, first_order=first),
        }
        for name, make in makes.items():
            found.append(("`clone`, `adapt`", order, name, partial(_learners, make=make)))
    maml = partial(l2l.algorithms.MAML, lr=RATE)
    found.append(("clone of a clone", "second", "MAML", partial(_learners, make=maml, nested=True)))
    gbml = partial(_scaled_gbml, l2l.algorithms.GBML, transform)
    found.append(("`clone`, `adapt`", "second", "GBML", partial(_learners, make=gbml)))
    scale = l2l.optim.ModuleTransform(l2l.nn.Scale)
    for steps, style in ((1, "outer step after each"), (STEPS, "several steps a task")):
        loop = partial(_hypergradient, transform=scale, steps=steps)
        found.append((f"hypergradient, {style}", "second", "LearnableOptimizer", loop))
    return found


def _hypergradient(notes: Notes, transform: Callable[..., Any], steps: int) -> None:
    """The learned optimizer is stepped after so many of its own steps: they are a task."""
    import learn2learn as l2l

    net = Net(batch_norm=True)
    inner = l2l.optim.LearnableOptimizer(net, transform, lr=RATE).double()
    outer = torch.optim.SGD(inner.parameters(), lr=1e-3)
    for number in range(steps * TASKS):
        x, y = batch()
        inner.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        if number % steps == 0:
            # before the very first step there is no gradient: the optimizer has done nothing yet
            notes.task()
            outer.step()
            outer.zero_grad()
        before = notes.values(named(net))
        inner.step()
        notes.step(loss, before, named(net))


def _scaled_gbml(gbml: Any, transform: Callable[..., Any], net: nn.Module) -> Any:
    return gbml(net, transform=transform, lr=RATE / 50, adapt_transform=False).double()


def _bilevel(notes: Notes, kind: str, unroll: int, accumulate: int = 1) -> None:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Inner(ImplicitProblem):
        def training_step(self, data: Any) -> Tensor:
            x, y = data
            penalty = (self.outer().exp() * self.module.second.weight.pow(2)).sum()
            return F.mse_loss(self.module(x), y) + penalty

        def on_inner_loop_start(self) -> None:
            notes.task()

        def one_step_descent(self, batch: Any = None) -> Any:
            if self._count % self.gas == 1 % self.gas:
                self.noted, self.losses = notes.values(named(self.module)), []
            result = super().one_step_descent(batch)
            self.losses.append(result["loss"])
            if self._count % self.gas == 0:
                mean = torch.tensor(self.losses, dtype=torch.float64).mean()
                notes.step(mean, self.noted, named(self.module))
            return result

    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log = nn.Parameter(torch.full((6,), -3.0, dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.log

    class Outer(ImplicitProblem):
        def training_step(self, data: Any) -> Tensor:
            x, y = data
            return F.mse_loss(self.inner(x), y)

    net, penalty = Net(batch_norm=True), Penalty()
    config = Config(type=kind, unroll_steps=unroll, gradient_accumulation=accumulate)
    inner = Inner("inner", config, net, torch.optim.SGD(net.parameters(), lr=RATE), None, [batch()])
    outer = Outer(
        "outer", Config(), penalty, torch.optim.Adam(penalty.parameters(), lr=0.05), None, [batch()]
    )
    logging.disable(logging.INFO)
    engine = Engine(
        [outer, inner],
        EngineConfig(train_iters=3 * unroll * accumulate),
        {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.run()
    logging.disable(logging.NOTSET)


def _betty() -> Found:
    return [
        ("`ImplicitProblem`, darts", "first", "SGD", partial(_bilevel, kind="darts", unroll=3)),
        ("`ImplicitProblem`, neumann", "first", "SGD", partial(_bilevel, kind="neumann", unroll=2)),
        ("`ImplicitProblem`, cg", "first", "SGD", partial(_bilevel, kind="cg", unroll=1)),
        (
            "gradient accumulation",
            "first",
            "SGD",
            partial(_bilevel, kind="darts", unroll=2, accumulate=2),
        ),
    ]


LIBRARIES: dict[str, Callable[[], Found]] = {
    "higher": _higher,
    "torchopt": _torchopt,
    "learn2learn": _learn2learn,
    "betty": _betty,
}


def cells(library: str) -> Found:
    """``(style, order, optimizer, loop)``; none where the library is not installed."""
    return LIBRARIES[library]() if importlib.util.find_spec(library) is not None else []
