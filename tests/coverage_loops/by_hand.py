"""Updates written by hand, in the styles people write them in."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.coverage_loops.notes import (
    NAMES,
    RATE,
    STEPS,
    TASKS,
    Net,
    Notes,
    batch,
    each,
    forward,
    functional_loop,
    in_place_loop,
    named,
)

State = dict[str, list[Tensor]]


def rebinding_list(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    return [p - RATE * g for p, g in each(fast, gradients)]


def a_dict(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    weights = dict(zip(NAMES, fast, strict=True))
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=second)
    moves = dict(zip(weights, gradients, strict=True))
    return [weights[name] - RATE * moves[name] for name in weights]


def an_ordered_dict(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    weights = OrderedDict(zip(NAMES, fast, strict=True))
    gradients = torch.autograd.grad(loss, weights.values(), create_graph=second)
    updated = OrderedDict(
        (name, p - torch.mul(RATE, g))
        for (name, p), g in zip(weights.items(), gradients, strict=True)
    )
    return list(updated.values())


def add_alpha(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    return [p.add(g, alpha=-RATE) for p, g in each(fast, gradients)]


def foreach_sub(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    return list(torch._foreach_sub(fast, torch._foreach_mul(gradients, RATE)))


def foreach_add_alpha(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    return list(torch._foreach_add(fast, gradients, alpha=-RATE))


def clip_by_norm(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    total = torch.sqrt(sum((g**2).sum() for g in gradients))
    scale = (0.1 / (total + 1e-6)).clamp(max=1.0)
    return [p - RATE * scale * g for p, g in each(fast, gradients)]


def clip_by_value(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    return [p - RATE * g.clamp(-0.01, 0.01) for p, g in each(fast, gradients)]


def momentum(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    old = state.get("velocity", [torch.zeros_like(p) for p in fast])
    state["velocity"] = [0.9 * v + g for v, g in zip(old, gradients, strict=True)]
    return [p - RATE * v for p, v in each(fast, state["velocity"])]


def weight_decay(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    decayed = [g + 0.1 * p for p, g in each(fast, gradients)]
    return [p - RATE * g for p, g in each(fast, decayed)]


def decoupled_decay(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    stepped = [p - RATE * g for p, g in each(fast, gradients)]
    return [new - RATE * 0.1 * p for new, p in zip(stepped, fast, strict=True)]


def per_coordinate_rates(
    loss: Tensor, fast: list[Tensor], state: State, second: bool
) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    rates = state.setdefault("rates", [torch.rand_like(p) * RATE for p in fast])
    return [p - rate * g for p, rate, g in zip(fast, rates, gradients, strict=True)]


@torch.compile(backend="eager")
def _damped(gradient: Tensor) -> Tensor:
    return gradient / (1 + gradient.abs())


def compiled_part(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    return [p - RATE * _damped(g) for p, g in each(fast, gradients)]


@torch.compile(backend="eager")
def _stepped(fast: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [p - RATE * g for p, g in zip(fast, gradients, strict=True)]


def compiled_update(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    return _stepped(fast, list(torch.autograd.grad(loss, fast, create_graph=second)))


def adam(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    count = len(state.setdefault("steps", []))
    state["steps"].append(loss.detach())
    zeros = [torch.zeros_like(p) for p in fast]
    state["m"] = [0.9 * m + 0.1 * g for m, g in each(state.get("m", zeros), gradients)]
    state["v"] = [0.99 * v + 0.01 * g * g for v, g in each(state.get("v", zeros), gradients)]
    m_hat = [m / (1 - 0.9 ** (count + 1)) for m in state["m"]]
    v_hat = [v / (1 - 0.99 ** (count + 1)) for v in state["v"]]
    return [
        p - RATE * m / (torch.sqrt(v + 1e-12) + 1e-6)
        for p, m, v in zip(fast, m_hat, v_hat, strict=True)
    ]


def one_call_a_parameter(
    loss: Tensor, fast: list[Tensor], state: State, second: bool
) -> list[Tensor]:
    updated = []
    for p in fast:
        (g,) = torch.autograd.grad(loss, p, create_graph=second, retain_graph=True)
        updated.append(p - RATE * g)
    return updated


def detached(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast)
    return [(p - RATE * g).detach().requires_grad_() for p, g in each(fast, gradients)]


def logged(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    state["log"] = [torch.tensor(g.norm().item()) for g in gradients]
    updated = [p - RATE * g for p, g in each(fast, gradients)]
    state["log"] += [
        torch.tensor((new - p).norm().item()) for new, p in zip(updated, fast, strict=True)
    ]
    return updated


def flattened(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast, create_graph=second)
    vector = parameters_to_vector(fast) - RATE * parameters_to_vector(gradients)
    updated, start = [], 0
    for p in fast:
        updated.append(vector[start : start + p.numel()].view_as(p))
        start += p.numel()
    return updated


def through_numpy(loss: Tensor, fast: list[Tensor], state: State, second: bool) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, fast)
    return [
        torch.from_numpy(p.detach().numpy() - RATE * g.numpy()).requires_grad_()
        for p, g in each(fast, gradients)
    ]


FUNCTIONAL = {
    "rebinding a list": rebinding_list,
    "a dict": a_dict,
    "an OrderedDict": an_ordered_dict,
    "`add(alpha=)`": add_alpha,
    "`_foreach_sub`": foreach_sub,
    "`_foreach_add(alpha=)`": foreach_add_alpha,
    "clipped by norm": clip_by_norm,
    "clipped by value": clip_by_value,
    "momentum": momentum,
    "weight decay": weight_decay,
    "decoupled weight decay": decoupled_decay,
    "per-coordinate rates": per_coordinate_rates,
    "gradients through a compiled function": compiled_part,
    "a compiled update": compiled_update,
    "Adam": adam,
    "one `grad()` a parameter": one_call_a_parameter,
    "norms logged with `item()`": logged,
    "one flattened vector": flattened,
}
FIRST_ORDER_ONLY = {
    "`detach().requires_grad_()`": detached,
    "through numpy": through_numpy,
}


def sub_no_grad(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in learner.parameters():
            p -= RATE * p.grad


def data_sub(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward()
    for p in learner.parameters():
        p.data.sub_(RATE * p.grad.data)


def data_assigned(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward()
    for p in learner.parameters():
        p.data = p.data - RATE * p.grad


def copied(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in learner.parameters():
            p.copy_(p - RATE * p.grad)


def foreach_in_place(learner: nn.Module, loss: Tensor) -> None:
    parameters = list(learner.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        torch._foreach_sub_(parameters, [RATE * g for g in gradients])


def foreach_add_in_place(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward()
    parameters = list(learner.parameters())
    with torch.no_grad():
        torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-RATE)


def grad_then_in_place(learner: nn.Module, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(learner.parameters()))
    with torch.no_grad():
        for p, g in each(list(learner.parameters()), gradients):
            p.add_(g, alpha=-RATE)


def two_writes(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(1 - 0.1 * RATE)
            p.sub_(RATE * p.grad)


def backward_of_inputs(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward(inputs=list(learner.parameters()))
    with torch.no_grad():
        for p in learner.parameters():
            p.sub_(RATE * p.grad)


def autograd_backward(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    torch.autograd.backward(loss)
    with torch.no_grad():
        for p in learner.parameters():
            p.sub_(p.grad, alpha=RATE)


def clip_grad_norm(learner: nn.Module, loss: Tensor) -> None:
    learner.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(learner.parameters(), 0.1)
    with torch.no_grad():
        for p in learner.parameters():
            p.sub_(RATE * p.grad)


def vector_written_back(learner: nn.Module, loss: Tensor) -> None:
    parameters = list(learner.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        vector = parameters_to_vector(parameters) - RATE * parameters_to_vector(gradients)
        vector_to_parameters(vector, parameters)


def state_dict_loaded(learner: nn.Module, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(learner.parameters()))
    moved = zip(learner.state_dict().items(), gradients, strict=True)
    learner.load_state_dict({name: p - RATE * g for (name, p), g in moved})


IN_PLACE = {
    "`p -= lr * p.grad`": sub_no_grad,
    "`p.data.sub_`": data_sub,
    "`p.data =`": data_assigned,
    "`copy_`": copied,
    "`_foreach_sub_`": foreach_in_place,
    "`_foreach_add_(alpha=)`": foreach_add_in_place,
    "`grad()`, then `add_(alpha=)`": grad_then_in_place,
    "decay, then step": two_writes,
    "`backward(inputs=)`": backward_of_inputs,
    "`torch.autograd.backward`": autograd_backward,
    "`clip_grad_norm_`": clip_grad_norm,
    "`vector_to_parameters`": vector_written_back,
    "`load_state_dict` as the update": state_dict_loaded,
}


def accumulated(notes: Notes) -> None:
    """Two backwards, one step: the step's loss is their sum."""
    net = Net()
    for _ in range(TASKS):
        notes.task()
        learner = copy.deepcopy(net)
        for _ in range(STEPS):
            learner.zero_grad()
            before = notes.values(named(learner))
            losses = []
            for _ in range(2):
                x, y = batch()
                loss = F.mse_loss(learner(x), y)
                loss.backward()
                losses.append(loss.detach())
            with torch.no_grad():
                for p in learner.parameters():
                    p -= RATE * p.grad
            notes.step(losses[0] + losses[1], before, named(learner))


def restored(notes: Notes, in_place: bool) -> None:
    """The model itself is trained, and its weights are put back before the next task."""
    net = Net()
    start = copy.deepcopy(net.state_dict())
    for _ in range(3):
        notes.task()
        net.load_state_dict(start)
        x, y = batch()
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        for _ in range(STEPS):
            loss = F.mse_loss(net(x), y)
            before = notes.values(named(net))
            net.zero_grad()
            loss.backward()
            if in_place:
                with torch.no_grad():
                    for p in net.parameters():
                        p -= RATE * p.grad
            else:
                optimizer.step()
            notes.step(loss, before, named(net))


def called_functionally(notes: Notes, second: bool) -> None:
    net = Net()
    outer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(2):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            fast = {name: p.clone() for name, p in net.named_parameters()}
            for _ in range(STEPS):
                loss = F.mse_loss(functional_call(net, fast, (x,)), y)
                before = notes.values(fast)
                gradients = torch.autograd.grad(loss, fast.values(), create_graph=second)
                fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), gradients, strict=True)}
                notes.step(loss, before, fast)
            F.mse_loss(functional_call(net, fast, (x,)), y).backward()
        notes.outer(named(net), outer.step)


class Tied(nn.Module):
    """The same weight at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, dtype=torch.float64)
        self.decode = nn.Linear(3, 3, dtype=torch.float64)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def tied(notes: Notes, second: bool) -> None:
    net = Tied()
    outer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(TASKS):
        notes.task()
        x = torch.randn(5, 3, dtype=torch.float64)
        fast = dict(net.named_parameters())
        for _ in range(STEPS):
            loss = F.mse_loss(functional_call(net, fast, (x,)), x)
            before = notes.values(fast)
            gradients = torch.autograd.grad(loss, fast.values(), create_graph=second)
            fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), gradients, strict=True)}
            notes.step(loss, before, fast)
        F.mse_loss(functional_call(net, fast, (x,)), x).backward()
    notes.outer(named(net), outer.step)


def head_only(notes: Notes, second: bool) -> None:
    """ANIL: the body is shared, the head adapts."""
    net = Net()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            features = torch.tanh(net.first(x))
            head = [net.second.weight, net.second.bias]
            for _ in range(STEPS):
                loss = F.mse_loss(F.linear(features, *head), y)
                before = notes.values(dict(zip(NAMES[2:], head, strict=True)))
                gradients = torch.autograd.grad(loss, head, create_graph=second, retain_graph=True)
                head = [p - RATE * g for p, g in each(head, gradients)]
                notes.step(loss, before, dict(zip(NAMES[2:], head, strict=True)))
            F.mse_loss(F.linear(features, *head), y).backward()
        notes.outer(named(net), outer.step)


def learned_rate(notes: Notes) -> None:
    """The outer optimizer learns the inner step size along with the weights."""
    net = Net()
    rate = nn.Parameter(torch.tensor(RATE, dtype=torch.float64))
    outer = torch.optim.Adam([*net.parameters(), rate], lr=1e-3)
    for _ in range(2):
        outer.zero_grad()
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            fast = list(net.parameters())
            for _ in range(STEPS):
                loss = F.mse_loss(forward(fast, x), y)
                before = notes.values(fast)
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [p - rate * g for p, g in each(fast, gradients)]
                notes.step(loss, before, fast)
            F.mse_loss(forward(fast, x), y).backward()
        notes.outer(named(net), outer.step)


def unequal_lengths(notes: Notes) -> None:
    """Tasks stop when they are good enough: no two need as many steps."""
    net = Net()
    outer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for length in (3, 3, 3, 2, 5, 1):
        notes.task()
        x, y = batch()
        fast = list(net.parameters())
        for _ in range(length):
            loss = F.mse_loss(forward(fast, x), y)
            before = notes.values(fast)
            gradients = torch.autograd.grad(loss, fast, create_graph=True)
            fast = [p - RATE * g for p, g in each(fast, gradients)]
            notes.step(loss, before, fast)
        outer.zero_grad()
        F.mse_loss(forward(fast, x), y).backward()
        notes.outer(named(net), outer.step)


def many_tasks(notes: Notes) -> None:
    """One step a task, many tasks, one outer step at the end."""
    net = Net()
    outer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(6):
        notes.task()
        x, y = batch()
        loss = F.mse_loss(net(x), y)
        before = notes.values(named(net))
        gradients = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        fast = [p - RATE * g for p, g in each(list(net.parameters()), gradients)]
        notes.step(loss, before, fast)
        F.mse_loss(forward(fast, x), y).backward()
    notes.outer(named(net), outer.step)


def outer_by_hand(notes: Notes) -> None:
    """No optimizer anywhere: the outer step is an in-place update of the leaves."""
    base = [p.detach().requires_grad_() for p in Net().parameters()]
    for _ in range(3):
        queries = []
        for _ in range(TASKS):
            notes.task()
            x, y = batch()
            fast = base
            for _ in range(STEPS):
                loss = F.mse_loss(forward(fast, x), y)
                before = notes.values(fast)
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [p - RATE * g for p, g in each(fast, gradients)]
                notes.step(loss, before, fast)
            queries.append(F.mse_loss(forward(fast, x), y))
        meta = torch.autograd.grad(torch.stack(queries).mean(), base)
        notes.outer(base, partial(_move, base, meta))


def _move(base: list[Tensor], gradients: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, g in each(base, gradients):
            p.sub_(g, alpha=0.1)


Cell = Callable[[Notes], None]


def cells() -> list[tuple[str, str, str, Cell]]:
    """``(style, order, optimizer, loop)`` for every update written by hand."""
    found: list[tuple[str, str, str, Cell]] = []
    for style, update in FUNCTIONAL.items():
        for second in (False, True):
            loop = partial(functional_loop, update=update, second_order=second)
            found.append((style, "second" if second else "first", "by hand", loop))
    for style, update in FIRST_ORDER_ONLY.items():
        loop = partial(functional_loop, update=update, second_order=False)
        found.append((style, "first", "by hand", loop))
    for style, move in IN_PLACE.items():
        found.append((style, "first", "by hand", partial(in_place_loop, update=move)))
    for second in (False, True):
        order = "second" if second else "first"
        found.append(
            ("`functional_call`", order, "by hand", partial(called_functionally, second=second))
        )
        found.append(("tied weights", order, "by hand", partial(tied, second=second)))
        found.append(("ANIL, head only", order, "by hand", partial(head_only, second=second)))
    found += [
        ("two backwards, one step", "first", "by hand", accumulated),
        ("restored by `load_state_dict`", "first", "by hand", partial(restored, in_place=True)),
        (
            "restored by `load_state_dict`",
            "first",
            "torch.optim.SGD",
            partial(restored, in_place=False),
        ),
        ("learned step size", "second", "by hand", learned_rate),
        ("tasks of unequal length", "second", "by hand", unequal_lengths),
        ("one step a task", "second", "by hand", many_tasks),
        ("outer step by hand", "second", "by hand", outer_by_hand),
    ]
    return found
