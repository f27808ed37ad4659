"""The first bad operation is named right on real loops, and looking for it changes nothing."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import higher
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

import divergence_probe
from divergence_probe.observe.forensics import investigator_of
from divergence_probe.observe.forensics.graph import Graph, family
from divergence_probe.rules.finding import Finding

CODES = ("FX001", "FX002", "FX003", "FX004", "FX005", "FX006")


def findings(loop: Callable[[], object]) -> list[Finding]:
    """What this file's rules say of ``loop``."""
    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        loop()
    assert probe.failure is None
    found = probe._current()._analysis.engine.findings
    return [finding for finding in found if finding.rule in CODES]


def the_one(loop: Callable[[], object]) -> Finding:
    found = findings(loop)
    assert [finding.rule for finding in found] == [found[0].rule]
    return found[0]


def line_of(function: Callable[..., Any], text: str) -> str:
    """``path:line`` of the line with ``text`` in a function of this file."""
    lines, start = inspect.getsourcelines(function)
    return f"{__file__}:{start + next(i for i, line in enumerate(lines) if text in line)}"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def maml(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: Callable[[int], tuple[Tensor, Tensor]],
    tasks: int = 2,
    steps: int = 3,
) -> list[float]:
    """Second-order MAML with higher; returns every loss."""
    outer = torch.optim.SGD(model.parameters(), lr=0.01)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for task in range(tasks):
        x, y = data(task)
        outer.zero_grad()
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(steps):
                loss = loss_of(fast(x), y)
                optimizer.step(loss)
                losses.append(loss.item())
            query = loss_of(fast(x), y)
            query.backward()
        losses.append(query.item())
        outer.step()
    return losses


def classes(task: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.randint(0, 2, (6,))


def one_nan(task: int) -> tuple[Tensor, Tensor]:
    x, y = classes(task)
    if task == 1:
        x[2, 3] = float("nan")
    return x, y


def log_of_zero(logits: Tensor, y: Tensor) -> Tensor:
    p = torch.softmax(1e4 * logits, 1)
    return -(F.one_hot(y, 2) * torch.log(p)).sum(1).mean()


def spread(z: Tensor, y: Tensor) -> Tensor:
    d = ((z[:, None] - z[None]) ** 2).sum(-1).sqrt()
    return F.cross_entropy(z, y) + torch.exp(-d).mean()


class Cosine(nn.Module):
    """A layer that normalises by the norm of its input, without an eps."""

    def forward(self, h: Tensor) -> Tensor:
        return h / h.norm(dim=1, keepdim=True)


def test_data_that_comes_in_bad() -> None:
    finding = the_one(lambda: maml(net(), F.cross_entropy, one_nan))
    assert (finding.rule, finding.cause) == ("FX001", "nonfinite-input")
    assert (finding.task, finding.step, finding.layer) == (1, 0, "0")
    assert finding.evidence["input_nonfinite"] == 1
    assert finding.marks[0].site == line_of(maml, "loss = loss_of(fast(x), y)")


def test_a_forward_operation_of_the_loss() -> None:
    finding = the_one(lambda: maml(net(), log_of_zero, classes))
    assert (finding.rule, finding.cause) == ("FX002", "singular-forward")
    assert finding.evidence["operation"] == "log"
    assert finding.evidence["input_min"] == 0
    assert (finding.task, finding.step) == (0, 0)
    assert finding.marks[0].site == line_of(log_of_zero, "torch.log(p)")


def test_a_forward_operation_in_a_module() -> None:
    def loop() -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Cosine(), nn.Linear(8, 2))
        with torch.no_grad():
            model[0].bias.fill_(-9.0)
        maml(model, F.cross_entropy, classes)

    finding = the_one(loop)
    assert (finding.rule, finding.layer) == ("FX002", "2")
    assert finding.evidence["operation"] == "div"
    assert finding.marks[0].site == line_of(Cosine, "h / h.norm")


def test_a_backward_operation() -> None:
    finding = the_one(lambda: maml(net(), spread, classes))
    assert (finding.rule, finding.cause) == ("FX003", "singular-backward")
    assert finding.evidence["operation"] == "sqrt"
    assert finding.evidence["phase"] == "backward"
    assert (finding.task, finding.step, finding.layer) == (0, 0, "0")
    assert finding.marks[0].site == line_of(spread, ".sqrt()")


def penalised(model: nn.Module, order: bool) -> None:
    base = dict(model.named_parameters())
    outer = torch.optim.SGD(base.values(), lr=0.01)
    for task in range(2):
        x, y = classes(task)
        fast = base
        for _ in range(3):
            loss = F.cross_entropy(functional_call(model, fast, (x,)), y)
            loss = loss + 1e-3 * fast["2.weight"].norm()
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=order)
            fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), grads, strict=True)}
        outer.zero_grad()
        F.cross_entropy(functional_call(model, fast, (x,)), y).backward()
        outer.step()


def zero_head() -> nn.Sequential:
    model = net()
    nn.init.zeros_(model[2].weight)
    return model


def test_a_backward_of_the_backward() -> None:
    finding = the_one(lambda: penalised(zero_head(), order=True))
    assert (finding.rule, finding.cause) == ("FX003", "singular-backward")
    assert finding.evidence["operation"] == "norm"
    assert finding.evidence["phase"] == "second backward"
    assert (finding.task, finding.step, finding.layer) == (0, 0, "2")
    assert finding.marks[0].site == line_of(penalised, ".norm()")


def rmsprop(inputs: Tensor, eps_root: float) -> None:
    model = net()
    base = dict(model.named_parameters())
    outer = torch.optim.SGD(base.values(), lr=0.01)

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (inputs,)), labels)

    labels = torch.randint(0, 2, (len(inputs),))
    for _ in range(2):
        fast = base
        square = {name: torch.zeros_like(p) for name, p in base.items()}
        for _ in range(3):
            g = grad(loss_of)(fast)
            square = {name: 0.9 * square[name] + 0.1 * g[name] ** 2 for name in fast}
            root = {name: torch.sqrt(square[name] + eps_root) for name in fast}
            fast = {name: fast[name] - 1e-3 * g[name] / (root[name] + 1e-8) for name in fast}
        outer.zero_grad()
        loss_of(fast).backward()
        outer.step()


def unused_column() -> Tensor:
    x = torch.randn(6, 4)
    x[:, 1] = 0.0
    return x


def test_the_root_of_a_zero_second_moment() -> None:
    finding = the_one(lambda: rmsprop(unused_column(), 0.0))
    assert (finding.rule, finding.cause) == ("FX004", "adam-sqrt-zero")
    assert (finding.task, finding.layer) == (0, "0")
    assert finding.evidence["input_zeros"] == 8
    assert finding.marks[0].site == line_of(rmsprop, "torch.sqrt(")


def in_place(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: Callable[[int], tuple[Tensor, Tensor]],
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    tasks: int = 3,
) -> list[float]:
    """Copies trained in place, as Reptile does."""
    losses = []
    for task in range(tasks):
        x, y = data(task)
        learner = copy.deepcopy(model)
        inner = optimizer(learner.parameters(), lr=1e-3)
        for _ in range(4):
            inner.zero_grad()
            loss = loss_of(learner(x), y)
            loss.backward()
            inner.step()
            losses.append(loss.item())
        with torch.no_grad():
            for p, q in zip(model.parameters(), learner.parameters(), strict=True):
                if q.isfinite().all():
                    p.lerp_(q, 0.1)
    return losses


def squares(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target) ** 2).mean()


def prices(task: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4).half(), torch.full((6, 2), 400.0 if task == 1 else 20.0).half()


def test_half_precision_overflows_in_the_loss() -> None:
    finding = the_one(lambda: in_place(net().half(), squares, prices))
    assert (finding.rule, finding.cause) == ("FX005", "low-precision")
    assert finding.evidence["operation"] == "pow"
    assert finding.evidence["dtype"] == "float16"
    assert (finding.task, finding.step) == (1, 0)
    assert finding.marks[0].site == line_of(squares, "** 2")


def summed(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum() / len(target)


def test_half_precision_overflows_before_the_mean_is_taken() -> None:
    def close(task: int) -> tuple[Tensor, Tensor]:
        return torch.randn(64, 4).half(), torch.full((64, 2), 60.0).half()

    finding = the_one(lambda: in_place(net().half(), summed, close))
    assert (finding.rule, finding.evidence["operation"]) == ("FX005", "sum")
    assert 3000 < float(finding.evidence["input_max"]) < 4000


def test_half_precision_eps_is_zero_in_the_update() -> None:
    def halves(task: int) -> tuple[Tensor, Tensor]:
        return unused_column().half(), torch.randint(0, 2, (6,))

    finding = the_one(lambda: in_place(net().half(), F.cross_entropy, halves, torch.optim.Adam))
    assert (finding.rule, finding.layer) == ("FX005", "0")
    assert finding.evidence["phase"] == "update"
    assert (finding.task, finding.step) == (0, 0)


def test_an_update_below_one_ulp() -> None:
    def loop() -> None:
        model = net().to(torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.sign() + 0.5)
        x = torch.randn(6, 4, dtype=torch.bfloat16)
        for _ in range(2):
            fast = [p.detach().requires_grad_() for p in model.parameters()]
            for _ in range(3):
                h = torch.tanh(F.linear(x, fast[0], fast[1]))
                loss = F.linear(h, fast[2], fast[3]).square().mean()
                grads = torch.autograd.grad(loss, fast)
                fast = [
                    (p - 1e-5 * g).detach().requires_grad_()
                    for p, g in zip(fast, grads, strict=True)
                ]

    finding = the_one(loop)
    assert (finding.rule, finding.severity.label) == ("FX006", "warning")


def masked(task: int) -> tuple[Tensor, Tensor]:
    return one_nan(task)


class Imputing(nn.Module):
    """Takes NaN in its input, and masks it first thing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.nan_to_num(x))


def safe_spread(z: Tensor, y: Tensor) -> Tensor:
    d = (((z[:, None] - z[None]) ** 2).sum(-1) + 1e-6).sqrt()
    return F.cross_entropy(z, y) + torch.exp(-d).mean()


def double_where(z: Tensor, y: Tensor) -> Tensor:
    rate = torch.relu(z)
    safe = torch.where(rate > 0, rate, torch.ones_like(rate))
    return torch.where(rate > 0, safe.log(), torch.zeros_like(rate)).mean()


def large(z: Tensor, y: Tensor) -> Tensor:
    return 1e6 * F.cross_entropy(z / 1e6, y)


def grows(logits: Tensor, y: Tensor) -> Tensor:
    return (logits**4).sum() * 1e3


HEALTHY: dict[str, Callable[[], object]] = {
    "padding masked": lambda: maml(Imputing(), F.cross_entropy, masked),
    "eps under the root": lambda: maml(net(), safe_spread, classes),
    "double where": lambda: maml(net(), double_where, classes),
    "large finite loss": lambda: maml(net(), large, classes),
    "first-order norm at 0": lambda: penalised(zero_head(), order=False),
    "eps_root": lambda: rmsprop(unused_column(), 1e-8),
    "copies": lambda: in_place(net(), F.cross_entropy, classes),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_look_alikes_are_silent(name: str) -> None:
    assert findings(HEALTHY[name]) == []


def reweighted() -> None:
    """Samples' weights are 0 / 0, outside the graph, in the model's own step; then all is NaN."""
    model, rater = nn.Linear(8, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    outer = torch.optim.Adam(rater.parameters(), lr=1e-2)

    def losses(x: Tensor, weights: list[Tensor]) -> Tensor:
        return (F.linear(x, *weights).squeeze(1) - x.sum(1)).square()

    for step in range(8):
        x, weights = torch.randn(32, 8), list(model.parameters())
        rated = rater(losses(x, weights).detach()[:, None]).sigmoid().squeeze(1)
        grads = torch.autograd.grad((rated * losses(x, weights)).mean(), weights, create_graph=True)
        fast = [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]
        outer.zero_grad()
        losses(torch.randn(32, 8), fast).mean().backward()
        outer.step()
        shares = rated.detach() * (step != 3)
        shares = shares / shares.sum()
        optimizer.zero_grad()
        (shares * losses(x, list(model.parameters()))).sum().backward()
        optimizer.step()


def test_an_exception_before_the_next_gradient_is_of_the_step_that_led_to_it() -> None:
    """A new task's first loss is NaN, and what samples from its weights raises."""

    def loop() -> None:
        base = torch.randn(4, 3, requires_grad=True)
        for task in range(2):
            w, mask = base, torch.tensor([0.0, 0.0, -math.inf if task else 0.0])
            for _ in range(2):
                p = (torch.randn(8, 4) @ w + mask).softmax(1)
                torch.multinomial(p.detach(), 1)
                loss = p[:, 0].mean() + (p * torch.log(p)).sum(1).mean()
                (slope,) = torch.autograd.grad(loss, w, create_graph=True)
                w = w - 0.1 * slope
            (torch.randn(8, 4) @ w).sum().backward()

    torch.manual_seed(0)
    with pytest.raises(RuntimeError), divergence_probe.attach() as probe:
        loop()
    found = {f.rule: f for f in probe.diagnosis.findings}
    assert (found["EX001"].task, found["EX001"].step) == (1, 1)
    assert (found["FX002"].task, found["FX002"].step) == (1, 0)
    assert found["FX002"].evidence["operation"] == "log"


def scaled(head_is_finite: bool) -> None:
    """A unit that never fires has no spread: 0 / 0, in a head made outside the graph, too."""
    body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with torch.no_grad():
        body[0].bias[0] = -50.0
    for task in range(3):
        (x, y), learner = classes(task), copy.deepcopy(body)
        with torch.no_grad():
            z = learner(x)
            mean, deviation = z.mean(0), z.std(0)
            z = (z - mean) / deviation
            head = torch.stack([z.nan_to_num() if head_is_finite else z for _ in range(2)]).mean(1)
        head.requires_grad_()
        inner = torch.optim.SGD([*learner.parameters(), head], 0.01)
        for _ in range(2):
            inner.zero_grad()
            z = (learner(x) - mean) / deviation
            F.cross_entropy(z @ head.t(), y).backward()
            inner.step()


@pytest.mark.parametrize("head_is_finite", [True, False])
def test_a_weight_that_is_bad_as_well_hides_no_operation(head_is_finite: bool) -> None:
    finding = the_one(lambda: scaled(head_is_finite))

    assert (finding.cause, finding.evidence["operation"]) == ("singular-forward", "div")
    assert finding.task == 0 and finding.evidence["input_zeros"] > 0


def test_what_a_bad_weight_leads_to_is_no_operation_s_doing() -> None:
    def loop() -> None:
        for task in range(3):
            x, y = classes(task)
            weights = [torch.full((4, 8), float("nan")), torch.randn(8, 2)]
            for _ in range(2):
                weights = [w.detach().requires_grad_() for w in weights]
                loss = F.cross_entropy(F.gelu(x @ weights[0]).relu() @ weights[1], y)
                grads = torch.autograd.grad(loss, weights)
                weights = [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]

    assert findings(loop) == []


def test_what_bad_weights_spoil_is_not_where_it_began() -> None:
    finding = the_one(reweighted)

    assert finding.cause == "nonfinite-input" and finding.evidence["operation"] == "mul"
    assert finding.marks[0].site == line_of(reweighted, "(shares * losses(")


def test_the_end_of_an_explosion_has_no_first_bad_operation() -> None:
    losses: list[float] = []

    def loop() -> None:
        losses.extend(maml(net(), grows, classes, steps=12))

    assert findings(loop) == []
    assert any(loss != loss for loss in losses)


@pytest.mark.parametrize(
    "loop",
    [
        lambda: maml(net(), F.cross_entropy, one_nan),
        lambda: maml(net(), spread, classes),
        lambda: maml(net(), safe_spread, classes),
        lambda: in_place(net().half(), squares, prices),
        lambda: maml(nn.Sequential(net(), nn.Dropout(0.3)), spread, classes),
    ],
)
def test_results_are_bit_identical(loop: Callable[[], list[float]]) -> None:
    torch.manual_seed(0)
    alone = (loop(), torch.rand(3))
    torch.manual_seed(0)
    with divergence_probe.attach():
        watched = (loop(), torch.rand(3))
    assert torch.equal(alone[1], watched[1])
    losses = [torch.tensor(values).nan_to_num(-1) for values in (alone[0], watched[0])]
    assert torch.equal(*losses)


def test_nothing_is_left_on_and_nothing_is_kept_alive() -> None:
    from torch.overrides import _get_current_function_mode_stack

    kept: list[weakref.ref[Tensor]] = []

    def loss_of(z: Tensor, y: Tensor) -> Tensor:
        loss = spread(z, y)
        kept.append(weakref.ref(loss))
        return loss

    with divergence_probe.attach():
        maml(net(), loss_of, classes, tasks=3)
        gc.collect()
        assert [reference for reference in kept if reference() is not None] == []
    assert _get_current_function_mode_stack() == []
    assert not torch.is_anomaly_enabled()


def test_an_error_of_ours_ends_forensics_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(Graph, "_collect", broken)
    with divergence_probe.attach() as probe:
        maml(net(), spread, classes)
    assert probe.failure is None
    assert any("could not be looked for" in reason for reason in probe.diagnosis.summary.incomplete)


def test_armed_only_for_a_while() -> None:
    with divergence_probe.attach() as probe:
        maml(net(), spread, classes, tasks=30)
        session = probe._current()._session
        assert session is not None
        assert investigator_of(session)._case.armed == 0


@pytest.mark.parametrize(
    ("node", "operation"),
    [
        ("LogSoftmaxBackward0", "log_softmax"),
        ("LinalgVectorNormBackward0", "norm"),
        ("AddmmBackward0", "linear"),
        ("SqrtBackward0", "sqrt"),
        ("PowBackward1", "pow"),
    ],
)
def test_nodes_have_the_names_users_know(node: str, operation: str) -> None:
    assert family(node) == operation
