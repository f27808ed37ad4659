"""Outer steps of what no task adapts: learned rates, the net around a context, and so on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe

STEPS, TASKS, ROUNDS = 3, 2, 5


def learned_rates():
    net = nn.Linear(3, 1)
    rates = [nn.Parameter(torch.tensor(-3.0)) for _ in net.parameters()]
    outer = torch.optim.Adam(rates, lr=0.01)
    x = torch.randn(16, 3)
    for _ in range(ROUNDS):
        outer.zero_grad()
        for _ in range(TASKS):
            fast = [p.detach().clone().requires_grad_() for p in net.parameters()]
            for _ in range(STEPS):
                loss = F.mse_loss(F.linear(x, *fast), x[:, :1])
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                steps = zip(fast, rates, gradients, strict=True)
                fast = [w - rate.exp() * g for w, rate, g in steps]
            F.mse_loss(F.linear(x, *fast), x[:, :1]).backward()
        outer.step()


def context_parameters():
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x = torch.randn(16, 3)
    for _ in range(ROUNDS):
        total = torch.zeros(())
        for _ in range(TASKS):
            context = torch.zeros(2, requires_grad=True)
            for _ in range(STEPS):
                loss = F.mse_loss(net(torch.cat([x, context.expand(16, 2)], 1)), x[:, :1])
                (gradient,) = torch.autograd.grad(loss, context, create_graph=True)
                context = context - 0.1 * gradient
            total = total + F.mse_loss(net(torch.cat([x, context.expand(16, 2)], 1)), x[:, :1])
        outer.zero_grad()
        total.backward()
        outer.step()


def learned_optimizer():
    maker = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    outer = torch.optim.Adam(maker.parameters(), lr=1e-3)
    for _ in range(ROUNDS):
        total = torch.zeros(())
        for _ in range(TASKS):
            goal, point = torch.randn(6), torch.zeros(6, requires_grad=True)
            for _ in range(STEPS):
                loss = (point - goal).square().mean()
                total = total + loss
                (gradient,) = torch.autograd.grad(loss, point, retain_graph=True)
                point = point + 0.1 * maker(gradient.detach()[:, None]).squeeze(1)
            total = total + (point - goal).square().mean()
        outer.zero_grad()
        total.backward()
        outer.step()


def latents_in_a_function():
    """Nothing of a task is alive when its gradient is taken, but the graph."""
    encoder, decoder = nn.Linear(3, 4), nn.Linear(4, 3)
    outer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)

    def query_loss(x):
        latent = encoder(x).mean(0)
        for _ in range(STEPS):
            loss = F.mse_loss(x @ decoder(latent), x[:, 0])
            (gradient,) = torch.autograd.grad(loss, latent, create_graph=True)
            latent = latent - 0.1 * gradient
        return F.mse_loss(x @ decoder(latent), x[:, 0])

    for _ in range(ROUNDS):
        total = sum(query_loss(torch.randn(16, 3)) for _ in range(TASKS))
        outer.zero_grad()
        total.backward()
        outer.step()


LOOPS = [learned_rates, context_parameters, learned_optimizer, latents_in_a_function]


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_gradient_through_tasks_moves_takes_outer_steps(loop):
    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        loop()
    summary = probe.diagnosis.summary

    assert (summary.tasks, summary.inner_steps) == (ROUNDS * TASKS, ROUNDS * TASKS * STEPS)
    assert summary.outer_steps == ROUNDS
    assert not probe.diagnosis.findings


def test_their_rows_are_kept_together():
    """A block for each outer step would cost more than the step: they have one of their own."""
    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        learned_rates()
    blocks = list(probe.recording.blocks())
    outer = [block for block in blocks if (block.scalars["task"] == -1).any()]

    assert sum(map(len, outer)) == ROUNDS
    assert len(outer) < ROUNDS  # (a slow machine closes blocks by the clock)
    assert (outer[0].parameters["gradient_norm"] > 0).all()


def test_losses_that_are_equal_are_no_unused_gradients():
    """A query that is fitted exactly has the loss 0 every time, and an optimizer steps on it."""
    net = nn.Linear(2, 1)
    outer = torch.optim.SGD(net.parameters(), lr=0.0)
    with divergence_probe.attach() as probe:
        for _ in range(6):
            fast = list(net.parameters())
            for _ in range(2):
                loss = F.linear(torch.ones(4, 2), *fast).square().mean()
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [w - 0.1 * g for w, g in zip(fast, gradients, strict=True)]
            outer.zero_grad()
            (0.0 * F.linear(torch.ones(4, 2), *fast).sum()).backward()
            outer.step()

    assert "LR004" not in {finding.rule for finding in probe.diagnosis.findings}


@pytest.mark.parametrize("summed", [True, False], ids=["summed", "one each"])
def test_gradients_of_tasks_put_into_grad_by_hand_are_an_outer_step(summed):
    """What adapts is a context; the net around it is moved by its tasks' gradients."""
    torch.manual_seed(0)
    net, rounds, tasks = nn.Linear(1 + 2, 1), 4, 3
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    with divergence_probe.attach() as probe:
        for _ in range(rounds):
            total = [torch.zeros_like(p) for p in net.parameters()]
            for _ in range(tasks if summed else 1):
                context, x = torch.zeros(2, requires_grad=True), torch.randn(8, 1)
                for _ in range(2):
                    loss = net(torch.cat([x, context.expand(8, 2)], 1)).square().mean()
                    (gradient,) = torch.autograd.grad(loss, context, create_graph=True)
                    context = context - 0.1 * gradient
                query = net(torch.cat([x, context.expand(8, 2)], 1)).square().mean()
                gradients = torch.autograd.grad(query, list(net.parameters()))
                total = [t + g for t, g in zip(total, gradients, strict=True)]
            for parameter, gradient in zip(net.parameters(), total, strict=True):
                parameter.grad = gradient
            optimizer.step()
    summary = probe.diagnosis.summary
    assert summary.tasks == rounds * (tasks if summed else 1)
    assert summary.outer_steps == rounds


def test_an_optimizer_that_idles_is_named_only_where_it_never_had_a_gradient():
    """One may wait for its turn; one that is fed nothing all along is a mistake."""
    torch.manual_seed(0)
    net, idle, late, frozen = (nn.Linear(2, 1) for _ in range(4))
    frozen.requires_grad_(False)

    class Drawing(torch.optim.Optimizer):
        """Moves by what it draws, as evolution strategies do."""

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.01 * torch.randn_like(parameter))

    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (idle, late, frozen)]
    drawing = Drawing(nn.Linear(2, 1).parameters(), {})
    with divergence_probe.attach() as probe:
        for task in range(6):
            fast = list(net.parameters())
            for _ in range(2):
                loss = torch.nn.functional.linear(torch.randn(8, 2), *fast).square().mean()
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [w - 0.1 * g for w, g in zip(fast, gradients, strict=True)]
            if task > 3:
                late(torch.randn(8, 2)).square().mean().backward()
            optimizers[0].step()
            optimizers[1].step()
            optimizers[2].step()
            drawing.step()
    events = [e for e in probe.recording.events() if e.kind == "optimizer-without-gradient"]
    assert [event.data["steps"] for event in events] == [6]


def test_a_gradient_that_clipping_made_zero_is_not_said_to_be_cut_off() -> None:
    """A finite gradient whose norm overflows is multiplied by nothing."""
    start = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([start], lr=1e-3)

    with divergence_probe.attach() as probe:
        for step in range(4):
            optimizer.zero_grad()
            z = start
            for _ in range(3):
                (slope,) = torch.autograd.grad(z.square().sum(), z, create_graph=True)
                z = z - 0.1 * slope
            (z.square().sum() * (1e25 if step == 2 else 1.0)).backward()
            torch.nn.utils.clip_grad_norm_([start], 1.0)
            optimizer.step()

    found = [f for f in probe.diagnosis.to_dict()["findings"] if f["rule"] == "MG001"]
    assert [f["count"] for f in found] == [1]
    assert "clipping made it zero" in found[0]["message"] and "detach" not in found[0]["fix"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_query_without_a_loss_has_a_gradient_of_zero(cut: bool) -> None:
    """Its faulty twin is cut off, with zeros in place of what never comes."""
    torch.manual_seed(0)
    x, y, start = torch.randn(20, 3), torch.randn(20, 1), nn.Parameter(torch.zeros(3, 1))
    optimizer = torch.optim.SGD([start], lr=0.1)
    start.grad = torch.zeros_like(start)

    with divergence_probe.attach() as probe:
        for _ in range(ROUNDS):
            weight = start.detach().requires_grad_() if cut else start
            for _ in range(STEPS):
                (slope,) = torch.autograd.grad((x @ weight - y).square().mean(), weight)
                weight = weight - 0.1 * slope
            optimizer.zero_grad(set_to_none=False)
            torch.relu((x @ weight - y).abs() - 100.0).mean().backward()
            optimizer.step()

    assert ("MG001" in {finding.rule for finding in probe.diagnosis.findings}) is cut


def test_a_query_through_steps_that_nobody_uses_is_no_unused_step() -> None:
    """The start is fixed and belongs to no optimizer; what is learned gets no gradient."""
    torch.manual_seed(0)
    x, y, start = torch.randn(20, 3), torch.randn(20, 1), torch.randn(3, 1).requires_grad_()
    penalty = nn.Parameter(torch.zeros(3, 1))
    outer = torch.optim.Adam([penalty], lr=0.05)

    with divergence_probe.attach() as probe:
        for _ in range(ROUNDS):
            weight = start
            for _ in range(STEPS):
                loss = (x @ weight - y).square().mean() + (penalty.exp() * weight.square()).sum()
                (slope,) = torch.autograd.grad(loss, weight)
                weight = weight - 0.1 * slope
            outer.zero_grad()
            (x @ weight - y).square().mean().backward()
            outer.step()

    diagnosis = probe.diagnosis.to_dict()
    assert diagnosis["root_cause"]["cause"] == "no-meta-gradient"
    assert "LR004" not in {found["rule"] for found in diagnosis["findings"]}


def test_a_base_that_was_trained_before_its_copies_are_adapted() -> None:
    """Ordinary training by another optimizer, and no task: those are the copies'."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    first, outer = (torch.optim.SGD(net.parameters(), lr=0.01) for _ in range(2))

    with divergence_probe.attach(net) as probe:
        for _ in range(20):
            first.zero_grad()
            net(torch.randn(8, 4)).square().mean().backward()
            first.step()
        for _ in range(ROUNDS):
            x, weights = torch.randn(8, 4), dict(net.named_parameters())
            for _ in range(STEPS):
                loss = torch.func.functional_call(net, weights, (x,)).square().mean()
                slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {
                    n: w - 0.1 * s for (n, w), s in zip(weights.items(), slopes, strict=True)
                }
            outer.zero_grad()
            torch.func.functional_call(net, weights, (x,)).square().mean().backward()
            outer.step()

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (ROUNDS, ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS


def test_a_base_that_is_adapted_in_place_once_it_is_trained() -> None:
    """Meta-training makes new weights; meta-test steps the net itself, put back for each task."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    outer = torch.optim.SGD(net.parameters(), lr=0.01)

    with divergence_probe.attach(net) as probe:
        for _ in range(ROUNDS):
            x, weights = torch.randn(8, 4), dict(net.named_parameters())
            for _ in range(STEPS):
                loss = torch.func.functional_call(net, weights, (x,)).square().mean()
                slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                moves = zip(weights.items(), slopes, strict=True)
                weights = {name: weight - 0.1 * slope for (name, weight), slope in moves}
            outer.zero_grad()
            torch.func.functional_call(net, weights, (x,)).square().mean().backward()
            outer.step()
        trained = {name: value.clone() for name, value in net.state_dict().items()}
        for _ in range(ROUNDS):
            net.load_state_dict(trained)
            x, inner = torch.randn(8, 4), torch.optim.SGD(net.parameters(), lr=0.1)
            for _ in range(STEPS):
                inner.zero_grad()
                net(x).square().mean().backward()
                inner.step()

    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (2 * ROUNDS, 2 * ROUNDS * STEPS)
    assert summary.outer_steps == ROUNDS


def test_a_hypergradient_by_hand_of_what_has_the_shape_of_the_weights_is_no_task():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randn(30)
    weights, decay = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    inner, outer = torch.optim.SGD([weights], lr=0.05), torch.optim.Adam([decay], lr=0.05)

    def fit():
        return ((x @ weights - y) ** 2).mean() + (decay.exp() * weights**2).sum()

    with divergence_probe.attach() as probe:
        for _ in range(5):
            weights.data.zero_()
            for _ in range(6):
                inner.zero_grad()
                fit().backward(inputs=[weights])
                inner.step()
            (first,) = torch.autograd.grad(((x @ weights - y) ** 2).mean(), weights)
            (slope,) = torch.autograd.grad(fit(), weights, create_graph=True)
            decay.grad = -torch.autograd.grad(slope, decay, first)[0]
            outer.step()
    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps) == (5, 30)
    assert not probe.diagnosis.findings
