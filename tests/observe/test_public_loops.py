"""Loops of the kinds found in public repositories that were once missed or misread."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import divergence_probe
from divergence_probe.record.schema import FLAGS, PHASES

RATE = 0.05


def forward(x: Tensor, weights: list[Tensor]) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, weights[0], weights[1])), weights[2], weights[3])


def weights() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((6, 3), (6,), (2, 6), (2,))
    return [(torch.randn(shape) / 2).requires_grad_() for shape in shapes]


def batches(tasks: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, 8, 3), torch.randn(tasks, 8, 2)


def codes(probe: divergence_probe.Probe) -> set[str]:
    return {finding.rule for finding in probe.diagnosis.findings}


def test_one_step_tasks_from_one_base_are_tasks_of_their_own() -> None:
    """MAML with one inner step: every gradient is taken of the base, and none is thrown away."""
    base = weights()
    outer = torch.optim.Adam(base, lr=1e-3)

    def query_loss(x: Tensor, y: Tensor) -> Tensor:
        grads = torch.autograd.grad(F.mse_loss(forward(x, base), y), base, create_graph=True)
        fast = [w - RATE * g for w, g in zip(base, grads, strict=True)]
        return F.mse_loss(forward(x, fast), y)

    with divergence_probe.attach() as probe:
        for _ in range(10):
            outer.zero_grad()
            losses = [query_loss(x, y) for x, y in zip(*batches(), strict=True)]
            torch.stack(losses).mean().backward()
            outer.step()

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (40, 40)
    assert not codes(probe) and probe.diagnosis.verdict == "healthy"


@pytest.mark.parametrize("batched", [False, True])
def test_second_order_is_seen_through_transforms(batched: bool) -> None:
    """What ``torch.func.grad`` returns inside vmap is wrapped; the outer backward goes through."""
    base = weights()
    outer = torch.optim.Adam(base, lr=1e-3)

    def query_loss(x: Tensor, y: Tensor) -> Tensor:
        grads = grad(lambda w: F.mse_loss(forward(x, w), y))(base)
        return F.mse_loss(forward(x, [w - RATE * g for w, g in zip(base, grads, strict=True)]), y)

    with divergence_probe.attach() as probe:
        for _ in range(3):
            outer.zero_grad()
            xs, ys = batches()
            losses = vmap(query_loss)(xs, ys) if batched else query_loss(xs[0], ys[0])
            losses.mean().backward()
            outer.step()

    assert not codes(probe)


def test_an_inner_gradient_under_an_outer_transform_is_second_order() -> None:
    base = [weight.detach() for weight in weights()]

    def meta_loss(base: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        grads = grad(lambda w: F.mse_loss(forward(x, w), y))(base)
        return F.mse_loss(forward(x, [w - RATE * g for w, g in zip(base, grads, strict=True)]), y)

    with divergence_probe.attach() as probe:
        for _ in range(3):
            xs, ys = batches()
            grad(lambda w, x, y: vmap(meta_loss, (None, 0, 0))(w, x, y).mean())(base, xs, ys)

    rows = [
        (phase, flags)
        for block in probe.recording.blocks()
        for phase, flags in zip(block.scalars["phase"], block.scalars["flags"], strict=True)
    ]
    inner = [int(flags) for phase, flags in rows if phase == PHASES.index("support")]
    assert len(inner) == 12 and all(flags & FLAGS["second_order"] for flags in inner)


@pytest.mark.parametrize("original_lives", [False, True])
def test_the_skeleton_of_a_functional_model_names_its_weights(original_lives: bool) -> None:
    """``functorch.make_functional`` calls a copy on the meta device, which has no values."""
    functorch = pytest.importorskip("functorch")
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
    names = [name for name, _ in net.named_parameters()]
    kept = net if original_lives else None
    with divergence_probe.attach() as probe:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            call, base, buffers = functorch.make_functional_with_buffers(net)
        del net
        outer = torch.optim.Adam(base, lr=1e-3)
        for x, y in zip(*batches(), strict=True):
            outer.zero_grad()
            fast = base
            for _ in range(3):
                loss = F.mse_loss(call(fast, buffers, x), y)
                grads = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
            F.mse_loss(call(fast, buffers, x), y).backward()
            outer.step()

    steps = probe.recording.steps()
    assert (probe.diagnosis.summary.tasks, probe.diagnosis.summary.inner_steps) == (4, 12)
    assert list(dict.fromkeys(steps.parameter)) == names
    assert (steps.phase == "outer").sum() == 4 * len(names)
    assert not codes(probe)
    del kept


def test_warnings_of_the_script_are_shown_as_often_as_without_the_probe(tmp_path: Path) -> None:
    """What changes Python's warning filters in the run makes it forget what it has shown."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, warnings, torch
            w = torch.ones(3, requires_grad=True)
            for _ in range(600):
                warnings.warn("heard of the script")
                fast = w
                for _ in range(2):
                    fast = fast - 0.01 * torch.autograd.grad(fast.pow(2).sum(), fast)[0]
                fast.sum().backward()
            print("pandas" in sys.modules)
            """
        )
    )
    command = [sys.executable, "-m", "divergence_probe", "run", "-o", str(tmp_path / "recording")]
    ran = subprocess.run([*command, str(script)], capture_output=True, text=True)

    assert ran.stdout == "False\n"
    assert ran.stderr.count("UserWarning: heard of the script") == 1


def test_a_large_meta_batch_may_keep_its_graphs_until_its_outer_step() -> None:
    base = weights()
    outer = torch.optim.Adam(base, lr=1e-3)
    with divergence_probe.attach() as probe:
        for tasks in (40, 40):
            outer.zero_grad()
            losses = []
            for x, y in zip(*batches(tasks), strict=True):
                fast = base
                for _ in range(2):
                    loss = F.mse_loss(forward(x, fast), y)
                    grads = torch.autograd.grad(loss, fast, create_graph=True)
                    fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
                losses.append(F.mse_loss(forward(x, fast), y))
            torch.stack(losses).mean().backward()
            outer.step()

    assert "MEM001" not in codes(probe)


def test_equal_zeros_are_not_one_model_that_starts_over() -> None:
    """Four vectors of zeros, each trained in place by an optimizer of its own: no inner loop."""
    vectors = [nn.Parameter(torch.zeros(5)) for _ in range(4)]
    optimizers = [torch.optim.Adam((vector,), lr=0.1) for vector in vectors]
    with divergence_probe.attach() as probe:
        for _ in range(4):
            for vector, optimizer in zip(vectors, optimizers, strict=True):
                optimizer.zero_grad()
                (vector - torch.randn(5)).pow(2).sum().backward()
                optimizer.step()

    assert probe.diagnosis.summary.tasks == 0


def test_vectors_of_zeros_made_anew_for_every_task_are_inner_loops() -> None:
    """The healthy look-alike: context parameters, which begin at zero and are left behind."""
    net = nn.Linear(5, 2)
    with divergence_probe.attach() as probe:
        for _ in range(4):
            context = torch.zeros(5, requires_grad=True)
            optimizer = torch.optim.SGD([context], lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(net(torch.ones(4, 5) + context), torch.zeros(4, 2)).backward()
                optimizer.step()

    assert (probe.diagnosis.summary.tasks, probe.diagnosis.summary.inner_steps) == (4, 12)


@pytest.mark.parametrize("loaded", [True, False])
def test_reptile_hands_its_optimizer_state_on(loaded: bool) -> None:
    """State put into a new optimizer is meant; one optimizer for every task carries it silently."""
    net = nn.Linear(3, 2)
    learner = copy.deepcopy(net)
    shared = torch.optim.Adam(learner.parameters(), lr=0.01)
    state = shared.state_dict()
    with divergence_probe.attach() as probe:
        for x, y in zip(*batches(), strict=True):
            if loaded:
                learner = copy.deepcopy(net)
                inner = torch.optim.Adam(learner.parameters(), lr=0.01)
                inner.load_state_dict(state)
            else:
                learner.load_state_dict(net.state_dict())
                inner = shared
            for _ in range(3):
                inner.zero_grad()
                F.mse_loss(learner(x), y).backward()
                inner.step()
            state = inner.state_dict()

    found = [finding for finding in probe.diagnosis.findings if finding.rule == "OPT001"]
    assert [finding.severity.label for finding in found] == ["info" if loaded else "warning"]


def test_copies_made_by_torchopt_and_moved_by_an_implicit_gradient() -> None:
    """iMAML: copies of the base, restored in place, and conjugate gradients inside a backward."""
    torchopt = pytest.importorskip("torchopt")
    meta = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    solver = torchopt.linear_solve.solve_normal_cg(maxiter=3, atol=0)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):
        def __init__(self, meta: nn.Module) -> None:
            super().__init__()
            self.meta = meta
            self.net = torchopt.module_clone(meta, by="deepcopy", detach_buffers=True)

        def restore(self) -> None:
            with torch.no_grad():
                for own, base in zip(self.parameters(), self.meta_parameters(), strict=True):
                    own.data.copy_(base.data)
                    own.detach_().requires_grad_()

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            both = zip(self.parameters(), self.meta_parameters(), strict=True)
            return F.mse_loss(self.net(x), y) + sum((a - b).pow(2).sum() for a, b in both)

        def solve(self, x: Tensor, y: Tensor) -> Inner:
            parameters = tuple(self.parameters())
            inner = torchopt.SGD(parameters, lr=0.1)
            with torch.enable_grad():
                for _ in range(3):
                    inner.zero_grad()
                    self.objective(x, y).backward(inputs=parameters)
                    inner.step()
            return self

    outer = torchopt.Adam(meta.parameters(), lr=1e-3)
    with divergence_probe.attach() as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nets = [Inner(meta) for _ in range(4)]
        for _ in range(3):
            losses = []
            for net, x, y in zip(nets, *batches(), strict=True):
                net.restore()
                losses.append(F.mse_loss(net.solve(x, y).net(x), y))
            outer.zero_grad()
            torch.stack(losses).mean().backward()
            outer.step()

    steps = probe.recording.steps()
    names = [name for name, _ in meta.named_parameters()]
    assert (probe.diagnosis.summary.tasks, probe.diagnosis.summary.inner_steps) == (12, 36)
    assert probe.diagnosis.summary.outer_steps == 3
    assert list(dict.fromkeys(steps.parameter)) == names
    assert codes(probe) <= {"MG003"}


def test_a_square_weight_used_transposed_is_recorded_as_it_is() -> None:
    """``x @ w.t()``: the transposed weight has the weight's own shape and is not its update."""
    torch.manual_seed(0)
    base = [torch.randn(6, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)]
    moved = []
    with divergence_probe.attach() as probe:
        for x, y in zip(torch.randn(4, 8, 6), torch.randn(4, 8, 2), strict=True):
            fast = [weight.clone() for weight in base]
            for _ in range(1):
                loss = F.mse_loss(torch.tanh(x @ fast[0].t()) @ fast[1].t(), y)
                grads = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
                moved.append((RATE * grads[0]).norm().item())
            F.mse_loss(torch.tanh(x @ fast[0].t()) @ fast[1].t(), y).backward()

    steps = probe.recording.steps()
    rows = steps[(steps.phase == "support") & (steps.parameter == steps.parameter.iloc[0])]
    assert rows.update_norm.to_list() == pytest.approx(moved, rel=1e-4)


def test_layers_outside_the_adapted_model_keep_one_name() -> None:
    """ANIL: the head alone is adapted, and the body's BatchNorm runs for support and query."""
    body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    head = nn.Linear(6, 2)
    losses = []
    with divergence_probe.attach() as probe:
        for x, y in zip(*batches(), strict=True):
            fast = list(head.parameters())
            support, query = body(x), body(x)
            for _ in range(2):
                loss = F.mse_loss(F.linear(support, *fast), y)
                grads = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
            losses.append(F.mse_loss(F.linear(query, *fast), y))
        torch.stack(losses).mean().backward()

    layouts = probe.recording.meta["layouts"]
    names = {name for layout in layouts for name in layout["batch_norms"]}
    assert sum(name.startswith("BatchNorm1d") for name in names) == 2


def test_products_with_a_hessian_are_no_steps_thrown_away() -> None:
    """Conjugate gradients of an implicit meta-gradient take one gradient again and again."""
    weight = torch.randn(2, 3, requires_grad=True)
    x, y = torch.randn(8, 3), torch.randn(8, 2)

    def loss() -> Tensor:
        return F.mse_loss(F.linear(x, weight), y)

    with divergence_probe.attach() as probe:
        for _ in range(2):
            for _ in range(2):  # the inner loop
                (gradient,) = torch.autograd.grad(loss(), weight)
                weight = (weight - RATE * gradient).detach().requires_grad_()
            for _ in range(6):
                torch.autograd.grad(loss(), weight, create_graph=True)

    assert "LR004" not in codes(probe)


def test_a_base_is_no_copy_of_itself() -> None:
    """Weights adapted in place by hand and moved by an outer optimizer: they equal themselves."""
    base = weights()
    outer = torch.optim.SGD(base, lr=0.01)
    with divergence_probe.attach() as probe:
        for x, y in zip(*batches(5), strict=True):
            for _ in range(3):
                grads = torch.autograd.grad(F.mse_loss(forward(x, base), y), base)
                for weight, gradient in zip(base, grads, strict=True):
                    weight.data -= RATE * gradient
            query = torch.autograd.grad(F.mse_loss(forward(x, base), y), base)
            for weight, gradient in zip(base, query, strict=True):
                weight.grad = gradient
            outer.step()

    assert (probe.diagnosis.summary.tasks, probe.diagnosis.summary.inner_steps) == (5, 15)
    assert "BASE001" in codes(probe)


def test_a_base_copied_from_a_living_model_is_moved_by_hand() -> None:
    """The outer step in place, on leaves that tasks began from and that equal another model's."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    base = [p.detach().clone().requires_grad_() for p in net.parameters()]
    with divergence_probe.attach() as probe:
        for _ in range(3):
            losses = []
            for x, y in zip(*batches(), strict=True):
                fast = base
                for _ in range(2):
                    loss = F.mse_loss(forward(x, fast), y)
                    grads = torch.autograd.grad(loss, fast, create_graph=True)
                    fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
                losses.append(F.mse_loss(forward(x, fast), y))
            outer = torch.autograd.grad(torch.stack(losses).mean(), base)
            with torch.no_grad():
                for weight, gradient in zip(base, outer, strict=True):
                    weight.sub_(0.01 * gradient)

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps, summary.outer_steps) == (12, 24, 3)
    assert len(list(net.parameters())) == 4


@pytest.mark.parametrize("cloned", [True, False])
def test_agents_that_look_ahead_at_each_other_move_no_base(cloned: bool) -> None:
    """LOLA: each adapts the other's weights, and only the two outer optimizers move any."""
    torch.manual_seed(0)
    agents = [torch.randn(5, requires_grad=True) for _ in range(2)]
    outers = [torch.optim.SGD([agent], lr=0.1) for agent in agents]
    payoff = torch.randn(5, 5)

    def loss(own: Tensor, other: Tensor) -> Tensor:
        return -torch.sigmoid(own) @ payoff @ torch.sigmoid(other)

    def looked_ahead(own: Tensor, other: Tensor) -> Tensor:
        fast = other.clone() if cloned else other
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss(fast, own), fast, create_graph=True)
            fast = fast - 0.3 * gradient
        return loss(own, fast)

    with divergence_probe.attach() as probe:
        for _ in range(4):
            losses = [looked_ahead(*agents), looked_ahead(*agents[::-1])]
            for outer, value in zip(outers, losses, strict=True):
                outer.zero_grad()
                value.backward(retain_graph=True, inputs=outer.param_groups[0]["params"])
            for outer in outers:
                outer.step()

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (8, 16)
    assert "BASE001" not in codes(probe) and probe.failure is None


def test_a_base_moved_by_hand_with_the_copies_gradients_is_not_the_inner_loops_doing() -> None:
    """First order MAML whose outer step is written into the base: no gradient is taken of it."""
    net = nn.Linear(3, 2)
    with divergence_probe.attach() as probe:
        for _ in range(4):
            learner = copy.deepcopy(net)
            inner = torch.optim.SGD(learner.parameters(), lr=RATE)
            x, y = torch.randn(8, 3), torch.randn(8, 2)
            for _ in range(2):
                inner.zero_grad()
                F.mse_loss(learner(x), y).backward()
                inner.step()
            query = torch.autograd.grad(F.mse_loss(learner(x), y), list(learner.parameters()))
            for parameter, gradient in zip(net.parameters(), query, strict=True):
                parameter.data -= 0.1 * gradient

    assert probe.diagnosis.summary.tasks == 4
    assert "BASE001" not in codes(probe) and probe.failure is None


class Listed(nn.Module):
    """As in dragen1860/MAML-Pytorch: all weights and statistics in lists, one forward for all."""

    def __init__(self) -> None:
        super().__init__()
        self.vars = nn.ParameterList()
        self.vars_bn = nn.ParameterList()
        for shape in ((6, 4), (6, 6)):
            self.vars.extend([nn.Parameter(torch.randn(shape) / 2), nn.Parameter(torch.zeros(6))])
            self.vars.extend([nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))])
            for start in (torch.zeros(6), torch.ones(6)):
                self.vars_bn.append(nn.Parameter(start, requires_grad=False))

    def forward(self, x: Tensor, variables: list[Tensor] | None = None) -> Tensor:
        w, statistics = variables or list(self.vars), list(self.vars_bn)
        for layer in (0, 1):
            x = F.linear(x, *w[4 * layer : 4 * layer + 2])
            mean, variance = statistics[2 * layer : 2 * layer + 2]
            x = F.batch_norm(x, mean, variance, *w[4 * layer + 2 : 4 * layer + 4], training=True)
        return x

    def parameters(self, recurse: bool = True) -> nn.ParameterList:  # type: ignore[override]
        return self.vars


def test_layers_of_weights_in_a_list_are_counted_once() -> None:
    """Also those of a copy that is adapted and thrown away, whose last query nothing follows."""
    torch.manual_seed(0)
    net = Listed()
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def adapted(learner: Listed, x: Tensor, y: Tensor) -> Tensor:
        fast = list(learner.parameters())
        for _ in range(3):
            grads = torch.autograd.grad(F.mse_loss(learner(x, fast), y), fast)
            fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
            with torch.no_grad():
                learner(x, list(learner.parameters()))
        return F.mse_loss(learner(x, fast), y)

    with divergence_probe.attach() as probe:
        for _ in range(5):
            outer.zero_grad()
            adapted(net, torch.randn(16, 4), torch.randn(16, 6)).backward()
            outer.step()
            adapted(copy.deepcopy(net), torch.randn(16, 4), torch.randn(16, 6))

    assert probe.diagnosis.summary.layers == 4
    assert {row.layer for row in probe.diagnosis.batch_norm} == {"vars.2", "vars.6"}


def test_gradients_handed_to_an_optimizer_belong_to_its_step() -> None:
    """``p.grad = g`` of ``autograd.grad``: the loss is the step's, and no query's."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    x, y = batches()
    with divergence_probe.attach() as probe:
        for task in range(4):
            learner = copy.deepcopy(net)
            inner = torch.optim.SGD(learner.parameters(), RATE)
            for _ in range(3):
                loss = F.mse_loss(learner(x[task]), y[task])
                grads = torch.autograd.grad(loss, list(learner.parameters()))
                for parameter, gradient in zip(learner.parameters(), grads, strict=True):
                    parameter.grad = gradient
                inner.step()

    steps = probe.recording.steps()
    support = steps[steps["phase"] == "support"]
    assert len(support["loss"].unique()) == 12 and support["loss"].notna().all()
    assert probe.diagnosis.health.support_loss is not None
    assert (steps["phase"] != "query").all()


def test_a_helper_that_takes_gradients_for_both_loops() -> None:
    """Its line hands gradients to the outer optimizer, and still serves inner steps by hand."""
    base = weights()
    outer = torch.optim.Adam(base, lr=1e-3)

    def gradients(loss: Tensor, of: list[Tensor], graph: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, of, create_graph=graph)

    with divergence_probe.attach() as probe:
        for x, y in zip(*batches(6), strict=True):
            fast = base
            for _ in range(3):
                grads = gradients(F.mse_loss(forward(x, fast), y), fast, True)
                fast = [w - RATE * g for w, g in zip(fast, grads, strict=True)]
            slopes = gradients(F.mse_loss(forward(x, fast), y), base, False)
            for parameter, slope in zip(base, slopes, strict=True):
                parameter.grad = slope
            outer.step()

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps, summary.outer_steps) == (6, 18, 6)


def test_a_copy_stepped_by_hand_before_an_outer_step_comes_before_it() -> None:
    """DARTS: the first copy is known for an inner loop's only by the outer step after it."""
    net = nn.Linear(3, 2)
    outer = torch.optim.SGD(net.parameters(), 0.1)
    x, y = batches(5)
    with divergence_probe.attach() as probe:
        for task in range(5):
            learner = copy.deepcopy(net)
            loss = F.mse_loss(learner(x[task]), y[task])
            grads = torch.autograd.grad(loss, list(learner.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(learner.parameters(), grads, strict=True):
                    parameter -= RATE * gradient
            outer.zero_grad()
            F.mse_loss(net(x[task]), y[task]).backward()
            outer.step()

    assert "BASE001" not in codes(probe)
    phases = probe.recording.steps().drop_duplicates("seconds")["phase"].tolist()
    assert [phase for phase in phases if phase != "query"] == ["support", "outer"] * 5


def test_updates_made_by_a_net_of_the_gradient() -> None:
    """A learned optimizer: its layers are given gradients, and what they make is the update."""
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    outer = torch.optim.Adam(maker.parameters(), lr=1e-3)
    with divergence_probe.attach() as probe:
        for _ in range(6):
            target, point, total = torch.randn(10), torch.zeros(10, requires_grad=True), 0.0
            for _ in range(5):
                loss = (point - target).square().mean()
                (gradient,) = torch.autograd.grad(loss, point, retain_graph=True)
                point = point + 0.1 * maker(gradient.detach()[:, None]).squeeze(1)
                total = total + loss
            outer.zero_grad()
            total.backward()  # type: ignore[attr-defined]
            outer.step()

    assert (probe.diagnosis.summary.tasks, probe.diagnosis.summary.inner_steps) == (6, 30)
    assert not {"LR003", "OPT001"} & codes(probe)


def test_a_net_makes_updates_of_gradients_that_tensors_keep() -> None:
    """A learned optimizer, truncated: ``backward`` and ``retain_grad`` instead of ``grad()``."""
    torch.manual_seed(0)
    cell, head = nn.LSTMCell(1, 8), nn.Linear(8, 1)
    outer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=1e-3)
    steps, windows, episodes = 5, 2, 3

    with divergence_probe.attach() as probe:
        for _ in range(episodes):
            goal, point, total = torch.randn(10), torch.zeros(10, requires_grad=True), None
            state = (torch.zeros(10, 8), torch.zeros(10, 8))
            for step in range(1, windows * steps + 1):
                loss = (point - goal).square().sum()
                total = loss if total is None else total + loss
                loss.backward(retain_graph=True)
                assert point.grad is not None
                state = cell(point.grad.detach().clone()[:, None], state)
                point = point + 0.1 * head(state[0]).squeeze(1)
                point.retain_grad()
                if step % steps == 0:
                    outer.zero_grad()
                    total.backward()
                    outer.step()
                    point = point.detach().requires_grad_()
                    state, total = tuple(s.detach() for s in state), None

    summary = probe.diagnosis.summary
    assert probe.failure is None
    assert (summary.tasks, summary.inner_steps) == (episodes * windows, episodes * windows * steps)
    assert summary.outer_steps == episodes * windows


def test_lookahead_resets_nothing_so_nothing_is_half_reset() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    slow = [parameter.detach().clone() for parameter in net.parameters()]
    with divergence_probe.attach() as probe:
        for step in range(40):
            optimizer.zero_grad()
            F.mse_loss(net(torch.randn(16, 3)), torch.randn(16, 2)).backward()
            optimizer.step()
            if step % 5 == 4:
                with torch.no_grad():
                    for kept, parameter in zip(slow, net.parameters(), strict=True):
                        kept += 0.5 * (parameter - kept)
                        parameter.copy_(kept)

    assert probe.diagnosis.verdict == "healthy"


def test_a_parameter_that_is_no_layers_weight_is_taken_as_the_others_are() -> None:
    """A policy's log deviation goes on through ``exp``: that is not what the step made of it."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    deviation = torch.zeros(2, requires_grad=True)
    outer = torch.optim.SGD([*net.parameters(), deviation], lr=0.0)
    x, y = batches(6)
    made = []
    with divergence_probe.attach() as probe:
        for task in range(6):
            base = [*net.parameters(), deviation]
            spread = deviation.exp()
            loss = ((F.linear(x[task], *base[:2]) - y[task]) / spread).square().mean()
            grads = torch.autograd.grad(loss + spread.log().sum(), base, create_graph=True)
            fast = [w - RATE * g for w, g in zip(base, grads, strict=True)]
            made.append(fast[2].norm().item())
            spread = fast[2].exp()
            outer.zero_grad()
            ((F.linear(x[task], *fast[:2]) - y[task]) / spread).square().mean().backward()
            outer.step()

    steps = probe.recording.steps()
    seen = steps[(steps["phase"] == "support") & (steps["parameter"].str.startswith("param[2]"))]
    assert seen["norm_after"].tolist() == pytest.approx(made)


def test_a_loss_that_was_computed_before_the_weights_it_is_asked_for() -> None:
    weight = torch.randn(2, 3, requires_grad=True)
    x, y = torch.randn(8, 3), torch.randn(8, 2)

    def adapt() -> None:
        for _ in range(2):
            fast = weight
            loss = F.mse_loss(F.linear(x, fast), y)
            for _ in range(2):
                (gradient,) = torch.autograd.grad(loss, fast, retain_graph=True)
                fast = fast - RATE * gradient

    probe = divergence_probe.attach()
    with pytest.raises(RuntimeError, match="used in the graph"), probe:
        adapt()

    (finding,) = (f for f in probe.diagnosis.findings if f.rule == "EX001")
    assert "depends on none" in finding.message and "allow_unused" not in finding.fix


@pytest.mark.parametrize("function", ["grad", "vector"])
def test_steps_computed_anew_to_be_differentiated_are_no_tasks(function):
    """Reverse and implicit hypergradients go through kept iterates once more."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randn(30)
    penalty = torch.ones(4, requires_grad=True)
    outer = torch.optim.SGD([penalty], lr=0.1)

    def step(w):
        loss = ((x @ w - y) ** 2).mean() + (penalty * w**2).sum()
        return w - 0.1 * torch.autograd.grad(loss, w, create_graph=True)[0]

    with divergence_probe.attach() as probe:
        for _ in range(5):
            kept = [torch.zeros(4, requires_grad=True)]
            for _ in range(6):
                kept.append(step(kept[-1]))
            kept = [w.detach().requires_grad_() for w in kept[-4:]]
            (along,) = torch.autograd.grad(((x @ kept[-1] - y) ** 2).mean(), kept[-1])
            total = torch.zeros(4)
            for w in reversed(kept[:-1]) if function == "grad" else [kept[-1]] * 3:
                made = step(w)
                (part,) = torch.autograd.grad(made, penalty, along, retain_graph=True)
                (along,) = torch.autograd.grad(made, w, along)
                total += part
            penalty.grad = total
            outer.step()
    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (5, 30)
    assert not [f for f in probe.diagnosis.findings if f.severity.name != "INFO"]
