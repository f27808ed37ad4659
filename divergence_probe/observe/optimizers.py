"""torch.optim, through its global step hooks: the outer optimizer, and inner ones in place."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from divergence_probe.observe.at_hand import are_same, mark_of
from divergence_probe.observe.idle_optimizers import IdleOptimizers
from divergence_probe.observe.in_place_tasks import Columns, InPlaceTasks
from divergence_probe.observe.loops import Loops
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.optimizer_facts import (
    Carried,
    OptimizerFacts,
    Step,
    learning_rate_of,
    state_values,
)
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import is_empty, pair, snapshot, spread
from divergence_probe.observe.step_targets import Targets
from divergence_probe.observe.tensors import identities

# Steps of originals, while the gradients are in copies, that are no coincidence.
_PASSED_BY = 3


def install(patches: Patches, session: Session, loops: Loops) -> None:
    """Watch every ``torch.optim`` step."""
    watch = session.instruments[Optimizers] = Optimizers(session, loops)
    patches.add_undo(register_optimizer_step_pre_hook(watch.before).remove)
    patches.add_undo(register_optimizer_step_post_hook(watch.after).remove)
    patches.set_attribute(Optimizer, "load_state_dict", watch.load)


def watching(session: Session) -> Optimizers:
    """What watches optimizers for ``session``, for those that torch's hooks do not reach."""
    return cast(Optimizers, session.instruments[Optimizers])


class _Arguments(dict[str, Any]):
    """The keywords a step is called with; a reference tells when that call is over."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.step: Step | None = None


class Optimizers:
    """Steps of optimizers: outer where they move a base, inner where they move its copies."""

    def __init__(self, session: Session, loops: Loops) -> None:
        self._session = session
        self._loops = loops
        self._thread = _Thread()
        self._tasks = InPlaceTasks(session, loops)
        self._targets = Targets(session, self._tasks, loops.tasks)
        self._idle = IdleOptimizers(session)
        #: Bases that no gradient can have reached yet: without one, their step is none.
        self.untouched: weakref.WeakSet[KnownModel] = weakref.WeakSet()
        #: Called with the backward an outer step used, before that step is recorded.
        self.spent: list[Callable[[Pending], None]] = []
        session.closing.append(loops.tasks.reptile.close)

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """A step of ``torch.optim`` begins (torch's hook); its closure is looked into, too."""
        under_way = self._thread.step
        if under_way is not None and under_way.optimizer is optimizer:
            self._cut_short(under_way)  # it is no part of itself
        if self._passes():
            return None
        state, under_way = self._session.guard.state, self._thread.step
        if under_way is not None and state.step is not None:
            return None  # in another's closure, and so part of that one's step
        alive = _Arguments(kwargs)
        with state:
            if under_way is not None:
                self._cut_short(under_way)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.begin(optimizer, _facts(optimizer), parameters)
            self._loops.tasks.moved(parameters)
            state.step = weakref.ref(alive)
        if len(args) > 1 and callable(args[1]):
            return (args[0], self.closure(args[1]), *args[2:]), alive
        if callable(alive.get("closure")):
            alive["closure"] = self.closure(alive["closure"])
        return args, alive

    def _cut_short(self, step: Step) -> None:
        """An exception ended a step, of which torch does not tell: say so, and watch again."""
        self._thread.step = None
        self._session.guard.state.leave_step()
        self._session.unseen(
            f"An exception ended a step of {step.facts.name}, and torch does not tell how far it "
            "came: that step is not recorded."
        )

    def load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A state put into an optimizer is meant to be there when its next task begins."""

        @functools.wraps(original)
        def load_state_dict(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            result = original(optimizer, *args, **kwargs)
            if not (torch.compiler.is_compiling() or self._passes()):
                with self._session.guard.work():
                    self._tasks.state_loaded(optimizer)
            return result

        return load_state_dict

    def closure(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Look at the first call of a closure as at what precedes any other step.

        Later calls (a line search) evaluate the loss at weights that are tried out.
        """
        step, guard = self._thread.step, self._session.guard
        first = step is not None

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if not first or step is None:
                with guard.inside():
                    return original(*args, **kwargs)
            first = False
            guard.state.gradient -= 1
            try:
                result = original(*args, **kwargs)
            finally:
                guard.state.gradient += 1
            with guard.work():
                step.pending = self._consumed(step.parameters)
                step.gradients = snapshot([p.grad for p in step.parameters], copy=True)
                if step.pending is not None:
                    self._session.name_forwards(step.pending.forwards, step.known, None)
            return result

        return watched

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step of ``torch.optim`` is complete (torch's hook)."""
        self.end(optimizer)

    def _passes(self) -> bool:
        guard = self._session.guard
        return not guard.watching or guard.state.is_in_gradient()

    def begin(self, optimizer: Any, facts: OptimizerFacts, parameters: Sequence[Tensor]) -> None:
        """Any optimizer is about to step in place: keep what it is about to overwrite."""
        self._thread.step = self._begin(optimizer, facts, list(parameters))
        state = self._session.guard.state
        state.outside, state.step = state.gradient, None
        state.gradient += 1  # a closure's gradients are the step's own

    def end(self, optimizer: Any) -> None:
        """The step that began last is complete."""
        step, guard = self._thread.step, self._session.guard
        if step is None or step.optimizer is not optimizer:
            return  # (part of a wrapper's own step)
        self._thread.step = guard.state.step = None
        guard.state.gradient -= 1
        with guard.work():
            self._end(step)

    def _begin(self, optimizer: Any, facts: OptimizerFacts, parameters: list[Tensor]) -> Step:
        pending = self._consumed(parameters)
        self._loops.tasks.settle_displaced()
        disturbed = self._loops.tasks.undone(parameters)
        target = self._targets.of(optimizer, parameters, pending)
        parameters = target.parameters
        passed_by = self._passed_by(parameters) if pending is None else None
        if passed_by is not None and target.base is not None:
            self._check_base_weights(passed_by, parameters)
        elif passed_by is not None:
            self._check_copies(passed_by, parameters)
        if pending is not None:
            self._session.name_forwards(pending.forwards, target.known, None)
        before, gradients = pair(parameters, [p.grad for p in parameters], (True, True))
        step = Step(
            optimizer,
            facts,
            parameters,
            before,
            [mark_of(p) for p in parameters],
            gradients,
            pending,
            self._session.sites.here(),
            target.known,
            target.positions,
            target.outer,
            target.base,
            disturbed,
        )
        if not step.outer:
            step.goes_on = self._tasks.going_on(step)
            if step.goes_on is None:  # a task may begin: what is left of earlier use is looked up
                step.carried = facts.carried()
        return step

    def _passed_by(self, parameters: list[Tensor]) -> Pending | None:
        """The gradient that waits for its step, while others are stepped that have none."""
        without = all(parameter.grad is None for parameter in parameters)
        return self._loops.pending if without else None

    def _check_base_weights(self, waiting: Pending, parameters: list[Tensor]) -> None:
        """Copies are stepped without a gradient, after a backward that went into the originals."""
        origins = [self._session.models.origin_of(parameter) for parameter in parameters]
        reached = identities(waiting.inputs)
        bases = [origin for origin in origins if origin is not None and id(origin) in reached]
        if bases:
            self._session.runs_base_weights(bases, waiting.site)

    def _check_copies(self, waiting: Pending, parameters: list[Tensor]) -> None:
        """Originals are stepped without a gradient, after a backward into their copies."""
        inputs = [tensor for r in waiting.inputs if (tensor := r()) is not None]
        origins = self._session.models.origins_of(inputs) if inputs else None
        if origins is None or not set(map(id, origins)) <= set(map(id, parameters)):
            return
        waiting.passed_by += 1
        if waiting.passed_by == _PASSED_BY:
            times = waiting.passed_by
            self._session.event("repeated-gradient", None, waiting.site, times=times)

    def _consumed(self, parameters: list[Tensor]) -> Pending | None:
        """The pending gradient this optimizer acts on, if it is its own."""
        pending = self._loops.pending
        if pending is None or not (pending.function == "backward" or _was_handed(pending)):
            return None
        if pending.written:
            self._loops.settle()  # it has led to a step by hand
            return None
        inputs = identities(pending.inputs)
        if inputs and inputs.isdisjoint(map(id, parameters)):
            return None
        by_hand = pending.learned.functional is False
        if pending.function == "backward" and not by_hand:
            # (A line that hands out gradients may serve others.)
            pending.learned.optimizer = [weakref.ref(parameter) for parameter in parameters]
        return self._loops.take_pending()

    def claim(self, tensors: Iterable[Tensor]) -> Pending | None:
        """The waiting backward, if it reached any of ``tensors``, for a library's step to use.

        An outer step by hand on what it reached may have preceded, or may still follow: so it goes
        on waiting, but another backward is none that adds to it.
        """
        pending = self._loops.pending
        if pending is None or pending.function != "backward" or not pending.reached(tensors):
            return None
        self._loops.settle_outer()
        pending.function = "grad"
        return pending

    def _end(self, step: Step) -> None:
        after = snapshot(step.parameters, copy=True)
        width = len(step.known.layout.parameters)
        columns = [
            spread(values, step.positions, width) for values in (step.before, after, step.gradients)
        ]
        if step.outer and not self._tasks.is_declared(step):
            self._outer(step, columns)
        else:
            idle = is_empty(step.gradients) and any(p.requires_grad for p in step.parameters)
            idle = idle and [mark_of(p) for p in step.parameters] == step.marks
            self._idle.note(step.site, step.facts.name, idle)
            self._tasks.step(step, columns)

    def _outer(self, step: Step, columns: Columns) -> None:
        """An outer step is complete: whatever was open before it is over."""
        if step.known in self.untouched and is_empty(step.gradients):
            return
        session, loops = self._session, self._loops
        loops.settle()
        if step.pending is not None:
            loops.tasks.not_a_step(step.pending)
            for note in self.spent:
                note(step.pending)
        for task in list(session.open):
            by_hand = task.in_place and task.known in session.adapted_by_hand
            if by_hand and task.known is step.known:
                session.confirm(task)  # what moved this base by hand were inner loops
        latest = self._targets.adapted_by_others(step.optimizer, step.parameters)
        if latest is not None and step.known not in session.unrolled:
            session.confirm(latest)  # (else its tasks are copies, and it was trained before them)
        loops.tasks.end_task()
        loops.tasks.outer_step(step.known)
        self._tasks.outer_step()
        self._targets.moved(step.known)
        session.just_stepped.add(step.known)
        session.outer_optimizers.add(step.optimizer)
        session.bases.difference_update(session.models.note_moved(step.parameters))
        session.outer_step(
            step.known,
            *columns,
            learning_rate=step.facts.learning_rate,
            site=step.site,
            around=self._targets.is_around(step.optimizer),
            optimizer=step.facts.name,
            reached=step.pending is not None,
        )


def _was_handed(pending: Pending) -> bool:
    """Whether the gradients of a ``grad()`` were made its parameters' ``.grad``, as they are."""
    handed = False
    for reference, gradient in zip(pending.inputs, pending.gradients, strict=True):
        parameter = reference()
        own = parameter.grad if parameter is not None and parameter.is_leaf else None
        if gradient is None or own is None or pending.function != "grad":
            return False
        if not are_same(own, gradient):
            return False
        handed = True
    return handed


def _facts(optimizer: Optimizer) -> OptimizerFacts:
    rate = learning_rate_of(optimizer.param_groups)
    return OptimizerFacts(
        type(optimizer).__name__, rate, lambda: Carried.of(state_values(optimizer.state))
    )
