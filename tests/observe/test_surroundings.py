"""Loops in the surroundings real ones have: compiled models, autocast, workers, threads."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import divergence_probe

TASKS, STEPS, RATE = 3, 3, 0.05


def adapt(
    net: nn.Module,
    forward: Callable[[dict[str, Tensor], Tensor], Tensor],
    x: Tensor,
    target: Tensor | None = None,
) -> list[float]:
    """Inner loops by hand on ``net``'s parameters; the norms of the first one before each step."""
    seen = []
    name = next(iter(dict(net.named_parameters())))
    for _ in range(TASKS):
        fast = dict(net.named_parameters())
        for _ in range(STEPS):
            seen.append(fast[name].norm().item())
            output = forward(fast, x)
            loss = F.mse_loss(output, torch.zeros_like(output) if target is None else target)
            grads = torch.autograd.grad(loss, list(fast.values()), allow_unused=True)
            fast = {
                key: (value - RATE * g).detach().requires_grad_() if g is not None else value
                for (key, value), g in zip(fast.items(), grads, strict=True)
            }
        forward(fast, x)
    return seen


def recorded(probe: divergence_probe.Probe, name: str) -> list[float]:
    """The recorded norms before each inner step of one parameter."""
    steps = probe.recording.steps()
    rows = steps[(steps.phase == "support") & (steps.parameter == name)]
    return [float(norm) for norm in rows.norm_before]


def check(
    net: nn.Module, forward: Callable[..., Tensor], x: Tensor, name: str | None = None
) -> Any:
    """Watch :func:`adapt` and compare every norm; the probe."""
    name = name or next(iter(dict(net.named_parameters())))
    with divergence_probe.attach() as probe:
        truth = adapt(net, forward, x)
    assert recorded(probe, name) == pytest.approx(truth, rel=1e-6)
    assert probe.diagnosis.summary.incomplete == ()
    return probe


def calling(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """A forward through ``functional_call``."""
    return lambda fast, x: functional_call(net, fast, (x,))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers in every test."""
    torch.manual_seed(0)


def test_recurrent_net() -> None:
    """A GRU's flat weights."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(3, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0]

    net = Net()
    check(net, calling(net), torch.randn(4, 6, 3), "gru.weight_ih_l0")


def test_attention() -> None:
    """Multi-head attention."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    net = Net()
    check(net, calling(net), torch.randn(4, 6, 8), "attention.in_proj_weight")


def test_tied_weights() -> None:
    """One parameter under two names is one parameter."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 4, bias=False)
            self.decode = nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(torch.tanh(self.encode(x)))

    net = Net()
    check(net, calling(net), torch.randn(5, 4), "encode.weight")


def test_parametrizations() -> None:
    """The originals are adapted, under the names torch gives them."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    name = "0.parametrizations.weight.original0"
    with divergence_probe.attach() as probe:
        first = dict(net.named_parameters())[name].norm().item()
        adapt(net, calling(net), torch.randn(4, 3))
    assert recorded(probe, name)[0] == pytest.approx(first, rel=1e-6)
    assert probe.diagnosis.summary.inner_steps == TASKS * STEPS


def test_autocast() -> None:
    """Master weights stay single precision; the loop is healthy."""
    net = nn.Linear(4, 4)

    def forward(fast: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional_call(net, fast, (x,)).float()

    assert check(net, forward, torch.randn(5, 4)).diagnosis.verdict == "healthy"


@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_another_kind_are_no_updates(used: torch.dtype) -> None:
    """Weights are logged in double precision, or run forward in half, made anew each time."""
    net = nn.Linear(4, 4)
    x, ends = torch.randn(5, 4), []
    with divergence_probe.attach() as probe:
        for _ in range(TASKS):
            fast = dict(net.named_parameters())
            for _ in range(STEPS):
                copied = {name: value.to(used) for name, value in fast.items()}
                loss = functional_call(net, copied, (x.to(used),)).float().square().mean()
                grads = torch.autograd.grad(loss, list(fast.values()))
                fast = {n: v - RATE * g for (n, v), g in zip(fast.items(), grads, strict=True)}
                ends.append([v.detach().to(torch.float64).norm().item() for v in fast.values()])
            copied = {name: value.to(used) for name, value in fast.items()}
            functional_call(net, copied, (x.to(used),))
            sum(value.sum() for value in fast.values()).backward()
    steps = probe.recording.steps()
    rows = steps[steps.phase == "support"]

    assert probe.diagnosis.summary.incomplete == ()
    truth = [norm for end in ends for norm in end]
    assert list(rows.norm_after) == pytest.approx(truth, rel=1e-6)


def test_checkpointing_in_place_is_no_fault() -> None:
    """A checkpointed model adapted in place recomputes with the weights it had."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    start = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(5, 4)
    with divergence_probe.attach() as probe:
        for _ in range(TASKS):
            net.load_state_dict(start)
            optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
            for _ in range(STEPS):
                optimizer.zero_grad()
                checkpoint(net, x, use_reentrant=False).square().mean().backward()
                optimizer.step()
    assert probe.diagnosis.summary.inner_steps == TASKS * STEPS
    assert probe.diagnosis.verdict == "healthy"


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_data_loader_workers(start_method: str) -> None:
    """Workers load, the parent is recorded; no worker writes into its recording."""
    loader = DataLoader(
        TensorDataset(torch.randn(8, 4)),
        batch_size=4,
        num_workers=1,
        multiprocessing_context=start_method,
    )
    net = nn.Linear(4, 2)
    with divergence_probe.attach() as probe:
        for (batch,) in loader:
            adapt(net, calling(net), batch)
    assert probe.diagnosis.summary.tasks == 2 * TASKS


def test_threads_do_not_mix() -> None:
    """Two threads adapt at once; every step belongs to its own task."""
    nets = [nn.Linear(3, 3), nn.Linear(4, 4)]
    with divergence_probe.attach(*nets) as probe:
        threads = [
            threading.Thread(
                target=adapt, args=(net, calling(net), torch.randn(5, net.in_features))
            )
            for net in nets
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    steps = probe.recording.steps()
    support = steps[steps.phase == "support"].drop_duplicates(["task", "step"])
    assert len(support) == 2 * TASKS * STEPS
    assert set(support.groupby("task").size()) == {STEPS}


def test_data_parallel_names_are_the_users_own() -> None:
    """The wrapper's prefix is no part of a name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # it takes what GPUs there are
    net = nn.DataParallel(nn.Linear(4, 2).to(device))
    with divergence_probe.attach(net) as probe:
        adapt(net.module, calling(net.module), torch.randn(5, 4, device=device))
    assert set(probe.recording.steps().parameter) == {"weight", "bias"}


def test_compiled_model_with_an_eager_update() -> None:
    """Observed as ever, and compiled into as many graphs as without the probe."""
    x = torch.randn(5, 4)

    def graphs(watched: bool) -> int:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        compiled = torch.compile(net, backend=counter)
        start = {name: value.clone() for name, value in net.state_dict().items()}

        def run() -> None:
            for _ in range(TASKS):
                net.load_state_dict(start)
                optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    compiled(x).square().mean().backward()
                    optimizer.step()

        if watched:
            with divergence_probe.attach() as probe:
                run()
            assert probe.diagnosis.summary.inner_steps == TASKS * STEPS
        else:
            run()
        return int(counter.frame_count)

    assert graphs(watched=True) == graphs(watched=False)


def test_a_compiled_functional_net_with_an_eager_update() -> None:
    """Our function mode is never traced into it: no graph more, none broken, none twice."""
    x, y = torch.randn(6, 4), torch.randn(6, 1)

    def forward(weights: list[Tensor], x: Tensor) -> Tensor:
        hidden = F.linear(x, weights[0], weights[1])  # (unflatten is a function in Python)
        return F.linear(torch.relu(hidden).unflatten(-1, (4, 2)).flatten(-2), *weights[2:])

    def graphs(watched: bool) -> tuple[int, list[float]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        compiled = torch.compile(forward, backend=counter)
        outer, losses = torch.optim.Adam(net.parameters()), []

        def run() -> None:
            for _ in range(TASKS):
                fast = list(net.parameters())
                for _ in range(STEPS):
                    loss = F.mse_loss(compiled(fast, x), y)
                    gradients = torch.autograd.grad(loss, fast, create_graph=True)
                    fast = [w - RATE * g for w, g in zip(fast, gradients, strict=True)]
                outer.zero_grad()
                query = F.mse_loss(compiled(fast, x), y)
                query.backward()
                outer.step()
                losses.append(query.item())

        if watched:
            with divergence_probe.attach(net) as probe:
                run()
            summary = probe.diagnosis.summary
            seen = summary.tasks, summary.inner_steps, summary.outer_steps
            assert seen == (TASKS, TASKS * STEPS, TASKS)
        else:
            run()
        return int(counter.frame_count), losses

    assert graphs(watched=True) == graphs(watched=False)


@pytest.mark.parametrize("compiled", ["loss", "loss and mode", "optimizer", "step"])
def test_nothing_of_ours_is_compiled(compiled: str) -> None:
    """As many graphs and breaks as without the probe, and every step recorded."""
    x, y = torch.randn(6, 4), torch.randn(6, 1)

    def graphs(watched: bool) -> tuple[int, int, list[float]]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        counter = torch._dynamo.testing.CompileCounter()
        compile_it = partial(torch.compile, backend=counter)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1))
        start = {name: value.clone() for name, value in net.state_dict().items()}
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        loss_of = lambda: F.mse_loss(net(x), y)  # noqa: E731
        move = optimizer.step
        if compiled == "loss":
            loss_of = compile_it(loss_of)
        if compiled == "loss and mode":
            loss_of = compile_it(lambda: F.mse_loss(net.eval()(x), y))
        if compiled == "optimizer":
            move = compile_it(move)

        def step() -> Tensor:
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            move()
            return loss

        take = compile_it(step) if compiled == "step" else step
        losses = []
        with divergence_probe.attach(net) if watched else nullcontext() as probe:
            for _ in range(TASKS):
                net.load_state_dict(start)
                losses += [take().item() for _ in range(STEPS)]
        if probe is not None:
            assert probe.failure is None
            seen = probe.diagnosis.summary
            assert (seen.tasks, seen.inner_steps) == (TASKS, TASKS * STEPS)
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        return int(counter.frame_count), breaks, losses

    bare, seen = graphs(watched=False), graphs(watched=True)
    assert seen[0] == bare[0] and seen[2] == bare[2]
    assert seen[1] <= bare[1]  # (a note on the profiler is counted as one, once a process)


def damped(gradient: Tensor) -> Tensor:
    """A gradient of at most 1."""
    return gradient / (1 + gradient.abs())


def stepped(weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """A whole update."""
    return [w - RATE * g for w, g in zip(weights, gradients, strict=True)]


@pytest.mark.parametrize("compiled", ["a part of it", "all of it"])
def test_an_update_is_followed_through_compiled_parts(compiled: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1))
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    part = torch.compile(damped if compiled == "a part of it" else stepped, backend="eager")
    norms, losses = [], []
    with divergence_probe.attach(net) as probe:
        for _ in range(TASKS):
            fast = list(net.parameters())
            for _ in range(STEPS):
                loss = F.mse_loss(F.linear(F.linear(x, *fast[:2]), *fast[2:]), y)
                gradients = torch.autograd.grad(loss, fast)
                if compiled == "a part of it":
                    fast = stepped(fast, [part(gradient) for gradient in gradients])
                else:
                    fast = part(fast, list(gradients))
                norms.append(fast[0].norm().item())
                losses.append(weakref.ref(loss))
            F.linear(F.linear(x, *fast[:2]), *fast[2:])  # the query
    del loss, fast
    assert [r for r in losses if r() is not None] == []
    steps = probe.recording.steps()
    seen = steps[(steps.parameter == "0.weight") & (steps.phase == "support")]
    assert list(seen.norm_after) == pytest.approx(norms, rel=1e-6)
    assert probe.diagnosis.verdict == "healthy"


def test_an_update_out_of_sight_is_not_called_none() -> None:
    """What a vmapped function makes of a gradient cannot be followed: nothing is said of it."""
    net = nn.Linear(4, 1)
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    with divergence_probe.attach(net) as probe:
        for _ in range(2 * TASKS):
            fast = list(net.parameters())
            for _ in range(STEPS):
                gradients = torch.autograd.grad(F.mse_loss(F.linear(x, *fast), y), fast)
                fast = stepped(fast, [torch.vmap(damped)(g) for g in gradients])
    assert probe.diagnosis.verdict == "unobserved"


def test_traced_operations_are_left_alone() -> None:
    """``make_fx`` writes operations down: there are no values, and ours do not belong there."""
    x, y = torch.randn(6, 4), torch.randn(6, 1)

    def nodes(loss_of: Callable[[Tensor], Tensor]) -> list[str]:
        return [str(node.target) for node in make_fx(loss_of)(torch.ones(1, 4)).graph.nodes]

    traced = [
        lambda w: F.mse_loss(F.linear(x, w), y),
        lambda w: F.batch_norm(F.linear(x, w), None, None, training=True),
        lambda w: torch.func.grad(lambda v: F.mse_loss(F.linear(x, v), y))(w),
        lambda w: torch.autograd.grad(F.linear(x, v := w.clone().requires_grad_()).sum(), v)[0],
    ]
    bare = [nodes(loss_of) for loss_of in traced]
    weight = torch.randn(1, 4, requires_grad=True)
    with divergence_probe.attach() as probe:
        (gradient,) = torch.autograd.grad(F.mse_loss(F.linear(x, weight), y), weight)
        assert [nodes(loss_of) for loss_of in traced] == bare
        fast = weight - RATE * gradient
        F.mse_loss(F.linear(x, fast), y)
    assert probe.failure is None


def test_signatures_stay_readable_while_watched() -> None:
    bare = inspect.signature(F.mse_loss), inspect.signature(torch.autograd.grad)
    with divergence_probe.attach():
        assert (inspect.signature(F.mse_loss), inspect.signature(torch.autograd.grad)) == bare


_COMPILES = """
import torch, divergence_probe
net = torch.nn.Linear(3, 1)
with divergence_probe.attach(net):  # torch.optim loads torch.compile's tables
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randn(2, 3)).sum().backward()
    outer.step()
    curvature = torch.func.hessian(lambda w: (w**3).sum())
    compiled = torch.compile(curvature, fullgraph=True, backend="eager")
    inside = compiled(torch.ones(2))
torch._dynamo.reset()
assert torch.equal(compiled(torch.ones(2)), inside)
"""


def test_transforms_are_compiled_while_watched_and_afterwards(tmp_path: Path) -> None:
    """In tables of its own functions, by identity, torch must not find ours in their place."""
    script = tmp_path / "script.py"
    script.write_text(_COMPILES, encoding="utf-8")
    subprocess.run([sys.executable, script], check=True, timeout=300)


def test_a_fully_compiled_step_is_unobserved() -> None:
    """What happens inside one compiled graph cannot be seen, and is not called healthy."""
    torch._dynamo.reset()
    net = nn.Linear(4, 4)

    @torch.compile(backend="eager", fullgraph=True)
    def step(weight: Tensor, x: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda w: F.linear(x, w).square().mean())(weight)
        return weight - RATE * gradient

    with divergence_probe.attach() as probe:
        weight = net.weight.detach()
        for _ in range(4):
            weight = step(weight, torch.randn(5, 4))
    assert probe.diagnosis.verdict == "unobserved"


@pytest.mark.parametrize("default", [None, "cpu"])
def test_a_default_device_hides_no_task(default: str | None) -> None:
    """``set_default_device`` is a function mode below ours, for the rest of the program."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    x, y = torch.randn(12, 4), torch.arange(3).repeat(4)
    torch.set_default_device(default)
    try:
        with divergence_probe.attach() as probe:
            for _ in range(TASKS):
                fast = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
                for _ in range(STEPS):
                    loss = F.cross_entropy(functional_call(net, fast, (x,)), y)
                    grads = torch.autograd.grad(loss, list(fast.values()))
                    fast = {
                        name: (p - RATE * g).detach().requires_grad_()
                        for (name, p), g in zip(fast.items(), grads, strict=True)
                    }
                functional_call(net, fast, (x,))
    finally:
        torch.set_default_device(None)

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (TASKS, TASKS * STEPS)
    assert probe.diagnosis.verdict == "healthy"
