"""On a real GPU: nothing waits for it between two blocks, nothing of it is kept.

Skipped where there is none. That every number and random draw stays the same there is tested
beside the CPU's in ``test_harmless``.
"""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F

import divergence_probe
from divergence_probe.observe import pending_rows
from tests.observe.test_harmless import LOOPS, Net, by_hand, vmapped, with_higher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

STEP_LOOPS = [loop for loop in LOOPS if loop is not vmapped]


@pytest.fixture(autouse=True)
def _back_to_quiet():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().cuda()


def waits(run):
    """How often ``run`` waited for the device, as torch itself counts it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


@pytest.mark.parametrize("loop", LOOPS)
def test_only_measuring_waits_for_the_device(loop, net, monkeypatch):
    original, measured = pending_rows.build_block, []

    def measuring(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        measured.append(original(*arguments))
        torch.cuda.set_sync_debug_mode("warn")
        return measured[-1]

    monkeypatch.setattr(pending_rows, "build_block", measuring)
    loop(net)  # what is made on first use (cuBLAS) has been made

    def watched():
        with divergence_probe.attach() as probe:
            loop(net)
        assert probe.failure is None

    bare, with_probe = waits(lambda: loop(net)), waits(watched)

    assert measured
    assert with_probe == bare


def test_a_block_waits_for_the_device_a_few_times(net, monkeypatch):
    """Not once a step, a layer or a parameter."""
    original, counts, rows = pending_rows.build_block, [], []

    def measuring(*arguments):
        rows.append(len(arguments[0]))
        result = []
        counts.append(waits(lambda: result.append(original(*arguments))))
        return result[0]

    monkeypatch.setattr(pending_rows, "build_block", measuring)
    with divergence_probe.attach() as probe:
        for _ in range(10):
            with_higher(net)

    assert probe.failure is None
    print(list(zip(rows, counts, strict=True)))
    assert max(rows) >= 32
    assert max(counts) < 24


@pytest.mark.parametrize("loop", STEP_LOOPS)
def test_no_memory_of_the_device_is_kept(loop, net):
    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    with divergence_probe.attach() as probe:
        sizes = []
        for _ in range(6):
            for _ in range(40):
                loop(net)
            _ = probe.recording  # measures what is pending
            sizes.append(allocated())
    assert probe.failure is None
    assert len(set(sizes[2:])) == 1


def test_norms_are_the_loops_own(net):
    norms = []
    fast = dict(net.named_parameters())
    with divergence_probe.attach(net) as probe:
        for _ in range(5):
            x, y = torch.randn(8, 4).cuda(), torch.randint(0, 3, (8,)).cuda()
            loss = F.cross_entropy(torch.func.functional_call(net, fast, (x,)), y)
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {
                name: w - 0.05 * g for (name, w), g in zip(fast.items(), gradients, strict=True)
            }
            norms.append(fast["first.weight"].detach().double().norm())
        torch.func.functional_call(net, fast, (x,)).sum().backward()
    steps = probe.recording.steps()
    rows = steps[(steps["parameter"] == "first.weight") & (steps["phase"] == "support")]
    assert rows["norm_after"].tolist() == pytest.approx([n.item() for n in norms], rel=1e-6)


def test_an_explosion_is_diagnosed(net):
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def exploding():
        fast = dict(net.named_parameters())
        for _ in range(40):
            x, y = torch.randn(8, 4).cuda(), torch.randint(0, 3, (8,)).cuda()
            output = torch.func.functional_call(net, fast, (x,))
            loss = F.mse_loss(output, F.one_hot(y, 3).float())
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: w - 30 * g for (name, w), g in zip(fast.items(), gradients, strict=True)}
        torch.func.functional_call(net, fast, (x,)).sum().backward()

    with divergence_probe.attach(net) as probe:
        for _ in range(3):
            exploding()
    assert probe.diagnosis.verdict == "diverged"
    assert probe.diagnosis.root_cause.cause == "inner-lr-too-high"


def test_a_healthy_loop_is_healthy(net):
    with divergence_probe.attach(net) as probe:
        for _ in range(3):
            by_hand(net)
    assert probe.diagnosis.verdict in ("healthy", "suspect")


def test_a_graph_is_captured_as_without(net):
    """Nothing of ours is captured, and no wait of ours ends it."""
    x = torch.randn(8, 4).cuda()
    side = torch.cuda.Stream()

    def captured():
        with torch.cuda.stream(side):
            for _ in range(3):
                torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
        graph.replay()
        torch.cuda.synchronize()
        return [gradient.clone() for gradient in gradients]

    net.eval()
    bare = captured()
    with divergence_probe.attach(net) as probe:
        by_hand(net)
        watched = captured()
        by_hand(net)
    assert probe.failure is None
    assert len(watched) == len(bare)
    assert all(gradient.isfinite().all() for gradient in watched)


def test_a_bad_loss_is_noticed_before_the_run_is_over(net):
    """Without a wait: the cause is found in the tasks that come after it."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).cuda()
    with divergence_probe.attach(net) as probe:
        for _ in range(6):
            fast = dict(net.named_parameters())
            for _ in range(4):
                x = torch.rand(8, 4).cuda()
                output = torch.func.functional_call(net, fast, (x,))
                loss = (output - output.detach()).log().mean()  # of zero
                gradients = torch.autograd.grad(loss, list(fast.values()))
                fast = {n: w - 0.1 * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
                torch.cuda.synchronize()
    assert probe.failure is None
    assert probe.diagnosis.root_cause.cause == "singular-forward"
