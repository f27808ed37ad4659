"""The probe changes nothing: numbers, random draws, exceptions, memory, torch itself."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import sys
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe
from divergence_probe.errors import DivergenceDetected
from divergence_probe.observe.session import Session
from divergence_probe.record.writer import Writer

RATE, TASKS, STEPS = 0.05, 3, 4
OPTIMIZER = sys.modules["torch.optim.optimizer"]  # the module takes itself off its package


class Net(nn.Module):
    """With everything that is observed: normalisation, dropout, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.drop(torch.tanh(self.norm(self.first(x)))))


def batch(net):
    """Drawn on the CPU, where a loader would draw it; the device's generator serves dropout."""
    order = torch.randperm(8)
    x, y = torch.randn(8, 4)[order], torch.randint(0, 3, (8,))
    device = next(net.parameters()).device
    return x.to(device), y.to(device)


def with_higher(net):
    higher = pytest.importorskip("higher")
    inner = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(TASKS):
        x, y = batch(net)
        outer.zero_grad()
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(STEPS):
                losses.append(F.cross_entropy(fast(x), y))
                optimizer.step(losses[-1])
            losses.append(F.cross_entropy(fast(x), y))
            losses[-1].backward()
        outer.step()
    return losses


def by_hand(net):
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(TASKS):
        x, y = batch(net)
        outer.zero_grad()
        fast = dict(net.named_parameters())
        for _ in range(STEPS):
            losses.append(F.cross_entropy(torch.func.functional_call(net, fast, (x,)), y))
            gradients = torch.autograd.grad(losses[-1], list(fast.values()), create_graph=True)
            fast = {
                name: w - RATE * g
                for (name, w), g in zip(fast.items(), gradients, strict=True)
            }  # fmt: skip
        losses.append(F.cross_entropy(torch.func.functional_call(net, fast, (x,)), y))
        losses[-1].backward()
        outer.step()
    return losses


def vmapped(net):
    net.norm = nn.Identity()  # running statistics cannot be moved under vmap
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(weights, x, y):
        return F.cross_entropy(torch.func.functional_call(net, weights, (x,)), y)

    def adapt(x, y):
        weights, seen = parameters, []
        for _ in range(STEPS):
            gradients, value = torch.func.grad_and_value(loss)(weights, x, y)
            weights = {name: weights[name] - RATE * gradients[name] for name in weights}
            seen.append(value)
        return torch.stack(seen), weights

    x, y = (torch.stack(parts) for parts in zip(*(batch(net) for _ in range(TASKS)), strict=True))
    losses, weights = torch.func.vmap(adapt, randomness="different")(x, y)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights[name].mean(0))
    return [losses]


def with_torch_optim(net):
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(TASKS):
        x, y = batch(net)
        learner = copy.deepcopy(net)
        inner = torch.optim.SGD(learner.parameters(), lr=RATE)
        for _ in range(STEPS):
            inner.zero_grad()
            losses.append(F.cross_entropy(learner(x), y))
            losses[-1].backward()
            inner.step()
        inner.zero_grad()
        losses.append(F.cross_entropy(learner(x), y))
        losses[-1].backward()
        for ours, theirs in zip(net.parameters(), learner.parameters(), strict=True):
            ours.grad = theirs.grad
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        outer.step()
    return losses


LOOPS = [with_higher, by_hand, vmapped, with_torch_optim]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random_state():
    """What every generator would draw next."""
    return torch.cat([torch.get_rng_state(), *torch.cuda.get_rng_state_all()])


def run(loop, device="cpu", **options):
    """Losses, weights, buffers and what random draws would follow, with or without the probe."""
    torch.manual_seed(0)
    net = Net().to(device)
    if options.pop("watched", True):
        with divergence_probe.attach(**options) as probe:
            losses = loop(net)
        assert probe.failure is None
    else:
        losses, probe = loop(net), None
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return [loss.detach() for loss in losses], state, random_state(), probe


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loop", LOOPS)
def test_every_number_and_random_draw_is_the_same(loop, device):
    losses, state, rng, _ = run(loop, device, watched=False)
    watched_losses, watched_state, watched_rng, probe = run(loop, device)

    assert probe.diagnosis.summary.inner_steps == TASKS * STEPS
    assert torch.equal(rng, watched_rng)
    assert len(losses) == len(watched_losses)
    assert all(map(torch.equal, losses, watched_losses))
    assert all(torch.equal(value, watched_state[name]) for name, value in state.items())


@pytest.mark.parametrize("method", ["step", "start_task", "flush", "event"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_fault_of_ours_switches_the_probe_off(loop, method, monkeypatch):
    losses, state, rng, _ = run(loop, watched=False)

    def failing(self, *args, **kwargs):
        raise ZeroDivisionError("of ours")

    torch.manual_seed(0)
    net = Net()
    monkeypatch.setattr(Session, method, failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with divergence_probe.attach() as probe:
            watched = loop(net)
    monkeypatch.undo()

    ours = [w for w in caught if "switched itself off" in str(w.message)]
    assert len(ours) == 1 and issubclass(ours[0].category, RuntimeWarning)
    assert "ZeroDivisionError: of ours" in str(ours[0].message)
    assert all(map(torch.equal, losses, watched)) and torch.equal(rng, random_state())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert probe.failure is not None
    diagnosis = probe.diagnosis
    assert any("switched itself off" in reason for reason in diagnosis.summary.incomplete)
    assert diagnosis.verdict != "healthy"


def test_what_was_seen_before_a_fault_of_ours_is_kept_but_never_called_healthy(monkeypatch):
    original, taken = Session.step, []

    def failing(self, *args, **kwargs):
        taken.append(1)
        if len(taken) > 6:
            raise ZeroDivisionError("of ours")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Session, "step", failing)
    with (
        pytest.warns(RuntimeWarning, match="switched itself off"),
        divergence_probe.attach() as probe,
    ):
        by_hand(nn.Linear(4, 3))

    assert probe.diagnosis.summary.inner_steps == 6
    assert probe.diagnosis.verdict == "unobserved"


def torch_itself():
    """Everything of torch (and higher) that an instrument could have changed, by name."""
    found = {}
    modules = [m for n, m in sys.modules.items() if n.split(".")[0] in ("torch", "higher")]
    for module in modules:
        for name, value in list(vars(module).items()):
            where = f"{module.__name__}.{name}"
            kind = type(value)  # isinstance() would wake torch's deprecated names
            if kind is types.FunctionType:
                found[where] = (
                    id(value), value.__code__, value.__defaults__, value.__kwdefaults__,
                    sorted(value.__dict__),
                )  # fmt: skip
            elif issubclass(kind, type) and value.__module__ == module.__name__:
                for attribute, what in vars(value).items():
                    if isinstance(what, types.FunctionType | classmethod | staticmethod):
                        plain = getattr(what, "__func__", what)
                        code = getattr(plain, "__code__", None)
                        found[f"{where}.{attribute}"] = (id(what), code)
            elif issubclass(kind, types.BuiltinFunctionType):
                found[where] = id(value)
    hooks = nn.modules.module
    for name in dir(hooks):
        if name.startswith("_global_"):
            found[name] = repr(getattr(hooks, name))
    found["optimizer hooks"] = [
        (n, repr(v)) for n, v in vars(OPTIMIZER).items() if n.startswith("_global")
    ]
    found["meta_path"] = list(map(id, sys.meta_path))
    found["modes"] = (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack())
    return found


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_of_ours_remains(loop):
    run(loop)  # what torch loads or caches on first use is not ours
    hooks, profile = (sys.excepthook, sys.unraisablehook), (sys.gettrace(), sys.getprofile())
    net, used = Net(), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    before = torch_itself()  # (torch wraps a class's step when the first of it is made)
    attributes = {id(m): set(vars(m)) for m in net.modules()}

    with divergence_probe.attach(net):
        during = torch_itself()
        loop(net)
    after = torch_itself()

    assert during != before  # or this test sees nothing
    changed = [name for name in before if before[name] != after.get(name)]
    assert changed == []
    assert {n for n in set(after) - set(before) if "divergence" in n} == set()
    assert (sys.excepthook, sys.unraisablehook) == hooks
    assert (sys.gettrace(), sys.getprofile()) == profile
    assert not used._optimizer_step_pre_hooks and not used._optimizer_step_post_hooks
    for module in net.modules():
        assert set(vars(module)) <= attributes.get(id(module), set(vars(module)))
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_nothing_remains_after_an_exception_of_the_users():
    by_hand(Net())
    before = torch_itself()

    def fail():
        by_hand(Net())
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        divergence_probe.attach()(fail)()

    assert torch_itself() == before


def test_the_base_model_can_be_pickled_and_copied_while_watched():
    torch.manual_seed(0)
    net = Net()
    with divergence_probe.attach(net):
        with_torch_optim(net)
        by_hand(net)
        for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))
            assert other(torch.zeros(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_graph_is_kept_alive(loop):
    torch.manual_seed(0)
    net = Net()
    with divergence_probe.attach() as probe:
        references = [weakref.ref(loss) for loss in loop(net)]
        gc.collect()
        alive = [reference for reference in references if reference() is not None]
        assert alive == []
    assert probe.diagnosis.summary.inner_steps == TASKS * STEPS


@pytest.mark.parametrize("loop", LOOPS)
def test_a_session_is_let_go_with_its_probe(loop):
    with divergence_probe.attach() as probe:
        loop(Net())
    session = weakref.ref(probe.session)
    del probe
    gc.collect()
    assert session() is None


def test_repeated_attach_starts_over():
    probe = divergence_probe.attach()
    for _ in range(2):
        with probe:
            by_hand(Net())
        assert probe.diagnosis.summary.tasks == TASKS


def test_nested_attach_sees_what_runs_inside_each():
    before = torch_itself()
    with divergence_probe.attach() as whole:
        by_hand(Net())
        with divergence_probe.attach() as part:
            by_hand(Net())
    assert torch_itself() == before

    assert part.diagnosis.summary.tasks == TASKS
    assert whole.diagnosis.summary.tasks == 2 * TASKS
    assert whole.failure is None and part.failure is None


def test_probes_may_end_in_the_order_in_which_they_began():
    before = torch_itself()
    first, second = divergence_probe.attach(), divergence_probe.attach()
    first.__enter__()
    second.__enter__()
    by_hand(Net())
    first.__exit__(None, None, None)
    by_hand(Net())
    second.__exit__(None, None, None)
    assert torch_itself() == before
    by_hand(Net())

    assert first.diagnosis.summary.tasks == TASKS
    assert second.diagnosis.summary.tasks == 2 * TASKS
    assert first.failure is None and second.failure is None


@pytest.mark.filterwarnings("ignore:divergence_probe switched itself off")
def test_a_recording_that_cannot_be_finished_does_not_reach_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with divergence_probe.attach(output="there") as probe:
        by_hand(Net())
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
    assert probe.failure is None
    assert len(probe.recording.tasks()) == TASKS

    with divergence_probe.attach(output="gone") as probe:
        by_hand(Net())
        shutil.rmtree("gone")
    assert probe.failure is None and probe.diagnosis.summary.tasks == TASKS

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "close", full)
    with divergence_probe.attach() as probe:
        by_hand(Net())
    assert "No space left" in probe.failure
    assert any("switched itself off" in reason for reason in probe.diagnosis.summary.incomplete)


def test_an_exception_that_cannot_say_what_it_is_comes_out_as_it_is():
    class Odd(Exception):
        def __str__(self):
            return self.args[5]

    probe = divergence_probe.attach()

    @probe
    def raising():
        by_hand(Net())
        raise Odd("mine")

    with pytest.raises(Odd):
        raising()
    assert probe.failure is None and probe.diagnosis.exception.type == "Odd"


def test_as_a_decorator():
    probe = divergence_probe.attach()

    @probe
    def meta_train(net, times=1):
        """Doc."""
        return [by_hand(net) for _ in range(times)]

    assert len(meta_train(Net(), times=2)) == 2
    assert meta_train.__name__ == "meta_train" and meta_train.__doc__ == "Doc."
    assert probe.diagnosis.summary.tasks == 2 * TASKS


def explode(net, steps=60):
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    fast = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    taken = 0
    for _ in range(steps):
        loss = F.mse_loss(torch.func.functional_call(net, fast, (x,)), y)
        gradients = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            name: (w - 50.0 * g).detach().requires_grad_()
            for (name, w), g in zip(fast.items(), gradients, strict=True)
        }
        taken += 1
    return taken


def test_raise_on_raises_inside_the_loop():
    torch.manual_seed(0)
    before, net = torch_itself(), nn.Linear(4, 3)

    with (
        pytest.raises(DivergenceDetected) as caught,
        divergence_probe.attach(raise_on="error") as probe,
    ):
        explode(net, steps=100_000)  # or it would take a minute

    assert caught.value.findings and caught.value.findings[0].severity.label == "error"
    assert "diverged" in str(caught.value)
    assert probe.diagnosis.verdict == "diverged" and probe.diagnosis.exception is None
    assert torch_itself() == before


def test_raise_on_says_nothing_of_a_healthy_loop():
    torch.manual_seed(0)
    with divergence_probe.attach(raise_on="error"):
        by_hand(Net())


def test_without_raise_on_nothing_is_raised():
    torch.manual_seed(0)
    with divergence_probe.attach() as probe:
        assert explode(nn.Linear(4, 3)) == 60
    assert probe.diagnosis.verdict == "diverged"


def test_the_user_s_exception_comes_out_as_it_is():
    def twice():
        loss = F.cross_entropy(Net()(torch.zeros(2, 4)), torch.zeros(2).long())
        loss.backward()
        loss.backward()

    with pytest.raises(RuntimeError) as caught:
        divergence_probe.attach()(twice)()

    assert "second time" in str(caught.value)
    assert not any(
        "divergence_probe" in str(note) for note in getattr(caught.value, "__notes__", [])
    )


def test_warnings_name_the_line_they_name_without_the_probe():
    net = nn.Linear(1, 1)

    def warned(times):
        """A loss of other sizes, and dropout of a vector, in a loop that is followed."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                x = torch.ones(4, 1)
                fast = list(net.parameters())
                loss = F.mse_loss(F.linear(x, *fast), torch.zeros(4))
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [w - 0.01 * g for w, g in zip(fast, gradients, strict=True)]
                query = nn.MSELoss()(nn.Dropout2d()(F.linear(x, *fast)), torch.zeros(4))
                query.backward()
        return [(w.filename, w.lineno, str(w.message)) for w in caught]

    bare = warned(6)
    with divergence_probe.attach(net) as probe:
        watched = warned(6)

    assert probe.diagnosis.summary.inner_steps == 6
    assert len(bare) == 18 and watched == bare


def test_deep_copies_of_plain_data_do_not_pass_through_us():
    calls = []

    def note(frame, event, argument):
        if event == "call" and "divergence_probe" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    data = {index: [index, (1, 2)] for index in range(50)}
    with divergence_probe.attach():
        sys.setprofile(note)
        copied = copy.deepcopy(data)
        sys.setprofile(None)
    assert copied == data and not calls


def test_a_model_that_copies_itself_part_by_part_keeps_its_names():
    class OfParts(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def __deepcopy__(self, memo):
            return OfParts(copy.deepcopy(self.body, memo))

    net = OfParts(nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
    with divergence_probe.attach(net) as probe:
        made = copy.deepcopy(net)
        models = probe._current()._session.models
    assert models.copied_name(made.body[1]) == "body.1"


def test_parametrized_modules_are_copied_as_without_the_probe() -> None:
    """Torch gives them a ``__deepcopy__`` where they have none: it must not see ours."""
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with divergence_probe.attach():
        made = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        copies = [copy.deepcopy(module) for module in (plain, made)]
        assert "__deepcopy__" in vars(nn.Module)
    copies.append(copy.deepcopy(made))

    assert "__deepcopy__" not in vars(nn.Module)
    assert vars(type(made)).keys() == vars(type(plain)).keys()
    for module, copied in zip((plain, made, made), copies, strict=True):
        assert torch.equal(copied.weight, module.weight)
