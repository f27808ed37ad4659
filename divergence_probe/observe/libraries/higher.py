"""higher: every differentiable optimizer is a task, every ``step`` of it an inner step.

Patched at class level (``DifferentiableOptimizer.__init__`` and ``step``, which no subclass
overrides), so ``innerloop_ctx``, ``get_diff_optim`` and ``create_diff_optim`` are covered under any
import. higher clones BatchNorm buffers for each task: the base's never move.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from divergence_probe.observe.at_hand import is_number_at_hand
from divergence_probe.observe.capture import NO_FORWARDS, Forwards
from divergence_probe.observe.forensics import investigator_of
from divergence_probe.observe.forensics.checking_mode import sequence_number
from divergence_probe.observe.forensics.inputs import Names, made_by
from divergence_probe.observe.forensics.windows import Window
from divergence_probe.observe.models import KnownModel, fast_module_names
from divergence_probe.observe.norms import norms
from divergence_probe.observe.optimizer_facts import Carried, learning_rate_of, state_values
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import Values, pair, snapshot
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import any_carries_graph, are
from divergence_probe.record.schema import FLAGS

LIBRARY = "higher"


def install(patches: Patches, session: Session) -> None:
    """Watch higher's patched models and differentiable optimizers."""
    import higher.optim
    import higher.patch

    watch = _Higher(session)
    optimizer = higher.optim.DifferentiableOptimizer
    patches.swap_code(higher.patch.monkeypatch, watch.monkeypatch)
    patches.set_attribute(optimizer, "__init__", watch.begin)
    patches.set_attribute(optimizer, "step", watch.step)
    cell = higher.innerloop_ctx.__closure__[0]  # the generator under @contextmanager
    original = cell.cell_contents
    cell.cell_contents = watch.context(original)
    patches.add_undo(lambda: setattr(cell, "cell_contents", original))


class _Higher:
    """What is known of higher's objects; weak, so that nothing of the user's is kept alive."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tasks: weakref.WeakKeyDictionary[Any, Task] = weakref.WeakKeyDictionary()
        self.bases: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], bool]] = (
            weakref.WeakKeyDictionary()
        )

    def monkeypatch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Note which model a patched one was made from, and whether its weights were copied."""
        known = inspect.signature(original).parameters
        position = list(known).index("copy_initial_weights")
        default = known["copy_initial_weights"].default

        def monkeypatch(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.session.guard.watching:
                with self.session.guard.work():
                    module = kwargs["module"] if "module" in kwargs else args[0]
                    copied = args[position] if len(args) > position else default
                    copied = bool(kwargs.get("copy_initial_weights", copied))
                    self.bases[result] = (weakref.ref(module), copied)
                    self.session.models.register(module)
            return result

        return monkeypatch

    def begin(self, original: Callable[..., None]) -> Callable[..., None]:
        """A differentiable optimizer is made: a task begins."""

        def __init__(  # noqa: N807 - it stands in for one
            self_: Any, other: Any, *args: Any, **kwargs: Any
        ) -> None:
            original(self_, other, *args, **kwargs)
            if self.session.guard.watching:
                with self.session.guard.work():
                    self._start(self_, other)

        return __init__

    def _start(self, optimizer: Any, other: Any) -> None:
        session = self.session
        fast = optimizer._fmodel
        base, copied = None, False
        known: KnownModel | None = None
        if fast is not None and fast in self.bases:
            reference, copied = self.bases[fast]
            base = reference()
        if base is not None:
            known = session.models.register(base)
            known.refresh(base)
        else:
            tensors = [p for group in other.param_groups for p in group["params"]]
            found = session.models.find(tensors[0]) if tensors else None
            known = found[0] if found else session.models.discover(tensors)
            known = known or session.models.nameless(tensors, [""] * len(tensors))
        carried = Carried.of(state_values(other.state))
        task = session.start_task(
            known,
            "higher",
            session.sites.here(),
            base=known,
            optimizer=type(other).__name__,
            track_higher_grads=bool(optimizer._track_higher_grads),
            copy_initial_weights=copied,
            carried_steps=carried.steps,
            carried_state=carried.state,
            trains_base=other in session.outer_optimizers,
            compiled=bool(
                fast is not None
                and "_compiled_call_impl" in fast.__dict__
                and fast.__dict__["_compiled_call_impl"] is not None
            ),
            base_training=bool(base.training) if base is not None else None,
        )
        if fast is not None:
            task.module_names = fast_module_names(fast)
        self.tasks[optimizer] = task

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """One inner step; its gradients are read through higher's own callback."""

        def step(
            self_: Any,
            loss: Tensor,
            params: Any = None,
            override: Any = None,
            grad_callback: Any = None,
            **kwargs: Any,
        ) -> Any:
            guard = self.session.guard
            task = self.tasks.get(self_) if guard.watching else None
            if task is None or task.ended:
                return original(self_, loss, params, override, grad_callback, **kwargs)
            callback = grad_callback if grad_callback is not None else self_._grad_callback
            params = list(params) if params is not None else None
            taken = _Taken(loss)
            forensics = investigator_of(self.session)

            def read(gradients: Any) -> Any:
                applied = callback(gradients) if callback is not None else gradients
                taken.gradients, taken.applied = gradients, applied
                taken.after = sequence_number()
                if not taken.calm:
                    forensics.gradient_taken()
                return applied

            with guard.work():
                self._open(taken, task, params if params is not None else self_._fmodel.fast_params)
            with guard.gradient_call():
                result = original(self_, loss, params, override, read, **kwargs)
            with guard.work():
                self._record(self_, task, taken, list(result))
            return result

        return step

    def _open(self, taken: _Taken, task: Task, parameters: Iterable[Tensor]) -> None:
        """A step is about to be taken of ``parameters``."""
        session, forensics = self.session, investigator_of(self.session)
        taken.before = list(parameters)
        taken.forwards = _take(session, task)
        taken.site = session.sites.here()
        if taken.site >= 0:
            task.data["step_site"] = taken.site
        taken.calm = not session.guard.state.transformed and forensics.calm(taken.site, taken.loss)
        taken.calm &= forensics.has_looked(taken.site)
        if taken.calm:
            taken.number = sequence_number()
        else:
            forensics.before(
                taken.site, taken.loss, taken.before, task, _names_in(task), library=True
            )

    def _record(self, optimizer: Any, task: Task, taken: _Taken, after: list[Tensor]) -> None:
        raw = _without_empty(taken.gradients)
        flags = FLAGS["second_order"] if any_carries_graph(taken.applied) else 0
        if taken.applied is not taken.gradients and _changed(taken.gradients, taken.applied):
            shrunk = _shrunk(taken.gradients, taken.applied)
            flags |= FLAGS["clippable"] | (FLAGS["clipped"] if shrunk else 0)
        before = _values(task, taken.before)
        values, gradients = pair(after, raw, (False, False), like=before)
        loss = taken.loss
        self.session.step(
            task,
            before,
            values,
            gradients,
            loss=loss.item() if is_number_at_hand(loss) else loss.detach(),
            learning_rate=learning_rate_of(optimizer.param_groups),
            site=task.data.get("step_site", -1),
            forwards=taken.forwards,
            flags=flags,
        )
        task.fast = list(map(weakref.ref, after))
        forensics = investigator_of(self.session)
        if taken.calm:
            window = Window(taken.site, made_by(taken.before), taken.number, taken.after)
            window.library = True
            forensics.passed(window, task, task.steps - 1, sequence_number())
        else:
            forensics.after(loss, taken.before, taken.gradients, _names_in(task))

    def context(self, original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """``innerloop_ctx`` ends its task when the ``with`` block does."""

        def innerloop(*args: Any, **kwargs: Any) -> Iterator[Any]:
            optimizer: Any = None
            generator = original(*args, **kwargs)
            try:
                pair = next(generator)
                optimizer = pair[1]
                yield pair
                for _ in generator:  # run what higher does after its yield
                    pass
            finally:
                generator.close()  # type: ignore[attr-defined]
                task = self.tasks.get(optimizer) if optimizer is not None else None
                if task is not None and self.session.guard.active:
                    with self.session.guard.work():
                        self.session.finish_task(task)

        return innerloop


@dataclass(slots=True)
class _Taken:
    """A step while it is taken.

    Attributes:
        loss: what its gradient is taken of.
        before: the parameters, the user's own.
        forwards: what ran forward for it.
        site: number of the user's line.
        calm: whether nothing is seen to be wrong with it.
        gradients: as they were taken.
        applied: as the user's callback left them.
        number: the next autograd node's number when it began.
        after: the same when the gradient was there, before the update.
    """

    loss: Tensor
    before: list[Tensor] = field(default_factory=list)
    forwards: Forwards = field(default_factory=lambda: NO_FORWARDS)
    site: int = -1
    calm: bool = False
    gradients: Any = ()
    applied: Any = ()
    number: int = -1
    after: int = -1


def _names_in(task: Task) -> Names:
    names = list(enumerate(info.name for info in task.known.layout.parameters))
    return lambda _: names


def _values(task: Task, before: list[Tensor]) -> Values:
    """Parameters before a step: what the step before made, where it is the same."""
    if task.last is not None and are(task.fast, before):
        return task.last.after
    return snapshot(before, copy=False)


def _take(session: Session, task: Task) -> Forwards:
    loose = session.loose.forwards
    if task.forwards.only_a_loss and loose.only_a_loss:  # a step's loss is known by itself
        task.forwards.losses.clear()
        loose.losses.clear()
        return NO_FORWARDS
    taken = task.forwards.take()
    taken.losses += session.loose.forwards.take().losses
    return taken


def _without_empty(gradients: Any) -> Values:
    """Gradients, None where higher made an empty one for a parameter the loss does not use."""
    try:
        if 0 not in map(Tensor.numel, gradients):
            return list(gradients)
    except TypeError:  # None among them
        pass
    return [g if g is None or g.numel() else None for g in gradients]


def _changed(raw: Any, applied: Any) -> bool:
    """Whether a gradient callback gave other tensors back (clipping, masking)."""
    return any(a is not b for a, b in zip(raw, applied, strict=False))


def _shrunk(raw: Any, applied: Any) -> bool:
    """Whether a callback made the gradients smaller; only asked where there is a callback."""
    before, after = (
        sum(float(n) ** 2 for n in norms([g.detach() for g in gradients if g is not None]))
        for gradients in (raw, applied)
    )
    return after < 0.998 * before
