"""torch.optim, through its global step hooks: the outer optimizer, and inner ones in place."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from divergence_probe.observe.capture import Forwards
from divergence_probe.observe.loops import Loops
from divergence_probe.observe.models import KnownModel, base_among
from divergence_probe.observe.naming import named
from divergence_probe.observe.nesting import Nesting
from divergence_probe.observe.optimizer_facts import (
    Carried,
    OptimizerFacts,
    learning_rate_of,
    state_values,
)
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.rollbacks import Rollbacks
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import (
    Values,
    are_equal,
    gathered,
    is_empty,
    pair,
    snapshot,
    spread,
)
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import identities, waits_for_nothing, was_left_alone


def install(patches: Patches, session: Session, loops: Loops) -> None:
    """Watch every ``torch.optim`` step."""
    watch = _WATCHES[session] = Optimizers(session, loops)
    patches.add_undo(register_optimizer_step_pre_hook(watch.before).remove)
    patches.add_undo(register_optimizer_step_post_hook(watch.after).remove)
    patches.set_attribute(Optimizer, "load_state_dict", watch.load)


_WATCHES: weakref.WeakKeyDictionary[Session, Optimizers] = weakref.WeakKeyDictionary()


def watching(session: Session) -> Optimizers:
    """What watches optimizers for ``session``, for those that torch's hooks do not reach."""
    return _WATCHES[session]


@dataclass
class _Step:
    """An optimizer step in progress."""

    optimizer: Any
    facts: OptimizerFacts
    parameters: list[Tensor]
    before: Values
    versions: list[int]
    gradients: Values
    pending: Pending | None
    site: int
    known: KnownModel
    positions: list[int]
    outer: bool
    base: KnownModel | None
    disturbed: Task | None = None
    carried: Carried = field(default_factory=Carried)
    goes_on: Task | None = None


class _Arguments(dict[str, Any]):
    """The keywords a step is called with; a reference tells when that call is over."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.step: _Step | None = None
        self.last: tuple[Pending | None, Task] | None = None


class Optimizers:
    """Steps of optimizers: outer where they move a base, inner where they move its copies."""

    def __init__(self, session: Session, loops: Loops) -> None:
        self._session = session
        self._loops = loops
        self._thread = _Thread()
        self._tasks: weakref.WeakKeyDictionary[Optimizer, Task] = weakref.WeakKeyDictionary()
        self._nesting = Nesting(session)
        self._rollbacks = Rollbacks()
        self._in_turn, self._reptile = loops.tasks.in_turn, loops.tasks.reptile
        self._loaded: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._through: weakref.WeakSet[Any] = weakref.WeakSet()
        # what was adapted in place, in inner loops that are known to be such
        self._adapted: weakref.WeakSet[KnownModel] = weakref.WeakSet()
        self._moved: weakref.WeakSet[KnownModel] = weakref.WeakSet()
        #: Bases that no gradient can have reached yet: without one, their step is none.
        self.untouched: weakref.WeakSet[KnownModel] = weakref.WeakSet()
        #: Called with the backward an outer step used, before that step is recorded.
        self.spent: list[Callable[[Pending], None]] = []
        session.closing += [self.close, self._reptile.close]
        session.restoring.append(self._restored)
        session.keeping.append(self._kept)

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

    def _cut_short(self, step: _Step) -> None:
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
            if not self._passes():
                with self._session.guard.work():
                    self._loaded.add(optimizer)
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

    def _begin(self, optimizer: Any, facts: OptimizerFacts, parameters: list[Tensor]) -> _Step:
        pending = self._consumed(parameters)
        disturbed = self._loops.tasks.undone(parameters)
        moved = self._base_of(parameters)
        if moved is not None and self._trains(optimizer, moved[0], pending):
            moved = None
        base: KnownModel | None = None
        if moved is not None:
            known, places = moved
            outer = True
            if pending is None or not pending.reached(parameters):
                self._in_turn.note_outer(optimizer, known)  # (its gradient was handed to it)
            parameters = [parameters[index] for index in places]
            positions = list(places.values())
        else:
            known, positions, base, outer = self._identify(optimizer, parameters, pending)
        if pending is None and base is not None:
            self._check_base_weights(parameters)
        if pending is not None:
            self._session.name_forwards(pending.forwards, known, None)
        before, gradients = pair(parameters, [p.grad for p in parameters], (True, True))
        step = _Step(
            optimizer,
            facts,
            parameters,
            before,
            [p._version for p in parameters],
            gradients,
            pending,
            self._session.sites.here(),
            known,
            positions,
            outer,
            base,
            disturbed,
        )
        if not outer:
            step.goes_on = self._going_on(step)
            if step.goes_on is None:  # a task may begin: what is left of earlier use is looked up
                step.carried = facts.carried()
        return step

    def _base_of(self, parameters: list[Tensor]) -> tuple[KnownModel, dict[int, int]] | None:
        """The base most of ``parameters`` belong to; and of those that do, their places in it."""
        whole = self._session.models.find_all(parameters)
        if whole is not None and whole[0] in self._session.bases:
            return whole[0], dict(enumerate(whole[1]))
        return base_among(self._session.bases, parameters)

    def _trains(self, optimizer: Any, known: KnownModel, pending: Pending | None) -> bool:
        """Whether a base is adapted in place (or just trained), though its tasks are copies.

        It is stepped by a gradient of its own weights, as it is in an outer step (DARTS, say). But
        it was adapted in place before, or steps again and no task began in between.
        """
        if pending is None or known in self._session.unrolled:
            return False
        if known not in self._adapted and known not in self._session.just_stepped:
            return False
        if self._in_turn.was_outer(optimizer, known):
            return False
        return pending.reached(t for r in known.parameters if (t := r()) is not None)

    def _identify(
        self, optimizer: Any, parameters: list[Tensor], pending: Pending | None
    ) -> tuple[KnownModel, list[int], KnownModel | None, bool]:
        """What parameters are that no base is known to have.

        Returns:
            The model that names them, their positions in it, the base they are copies of (if they
            are), and whether to move them is an outer step.
        """
        session = self._session
        if any(map(session.models.begun, parameters)):
            known, positions = named(session.models, parameters, parameters)
            return known, positions, None, True
        if self._goes_through_tasks(optimizer, pending):
            known, positions = named(session.models, parameters, parameters)
            return known, positions, None, True
        others = self._adapted_by_others(optimizer, parameters)
        if others is not None and self._in_turn.is_outer(optimizer, others, parameters, pending):
            return others.known, others.positions, None, True
        task = self._tasks.get(optimizer)
        if task is not None and not task.ended and _adapts(task, parameters):
            # (clones that were named by value have other values by now)
            return task.known, task.positions, task.base, False
        copied, positions = self._copied_from(parameters, pending)
        if copied is not None:
            return copied, positions, copied, False
        equal = self._equal_to_base(parameters)
        known, positions = equal or named(session.models, parameters, parameters)
        base = known if equal else None
        moves_base = known in session.bases and not self._trains(optimizer, known, pending)
        by_optimizer = any(t.known is known and t.base is None for t in self._nesting.tasks)
        moves_base |= known in session.adapted_by_hand and not by_optimizer
        return known, positions, base, base is None and moves_base

    def _goes_through_tasks(self, optimizer: Any, pending: Pending | None) -> bool:
        """Whether an optimizer's gradient comes through what tasks made, whatever it moves.

        (Learned rates, a network around the weights that adapt, a learned optimizer.) Its leaves
        are looked for the first time only: it is an outer optimizer then, for good.
        """
        if pending is not None and pending.through_task:
            pending.through = False  # this is the step it led to
            self._through.add(optimizer)
        return optimizer in self._through

    def _adapted_by_others(self, optimizer: Any, parameters: list[Tensor]) -> Task | None:
        """The latest task in which another optimizer adapted these very weights, in this order."""
        own = self._tasks.get(optimizer)
        for task in reversed(self._nesting.tasks):
            if task.base is None and task is not own and _adapts(task, parameters):
                return task
        return None

    def _check_base_weights(self, parameters: list[Tensor]) -> None:
        """Copies are stepped without a gradient, after a backward that went into the originals."""
        waiting = self._loops.pending
        if waiting is None or any(parameter.grad is not None for parameter in parameters):
            return
        origins = [self._session.models.origin_of(parameter) for parameter in parameters]
        reached = identities(waiting.inputs)
        bases = [origin for origin in origins if origin is not None and id(origin) in reached]
        if bases:
            self._session.runs_base_weights(bases, waiting.site)

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

    def _end(self, step: _Step) -> None:
        after = snapshot(step.parameters, copy=True)
        width = len(step.known.layout.parameters)
        columns = [
            spread(values, step.positions, width) for values in (step.before, after, step.gradients)
        ]
        if step.outer and not self._declared_inner(step):
            if step.known in self.untouched and is_empty(step.gradients):
                return
            self._loops.settle()
            if step.pending is not None:
                self._loops.tasks.not_a_step(step.pending)
                for note in self.spent:
                    note(step.pending)
            for task in list(self._session.open):
                by_hand = task.in_place and task.known in self._session.adapted_by_hand
                if by_hand and task.known is step.known:
                    self._session.confirm(task)  # what moved this base by hand were inner loops
            latest = self._adapted_by_others(step.optimizer, step.parameters)
            if latest is not None:
                self._session.confirm(latest)
            self._loops.tasks.end_task()
            self._loops.tasks.outer_step(step.known)
            self._nesting.outer_step()
            self._moved.add(step.known)
            self._session.just_stepped.add(step.known)
            self._session.bases.difference_update(self._session.models.note_moved(step.parameters))
            self._session.outer_step(
                step.known,
                *columns,
                learning_rate=step.facts.learning_rate,
                site=step.site,
                around=step.optimizer in self._through,
                optimizer=step.facts.name,
            )
            return
        if step.base is None and is_empty(step.gradients):
            return  # an optimizer that moves nothing takes no step
        task = self._task(step)
        if self._merge(step, task, columns):
            return
        pending = step.pending
        flags = pending.flags if pending is not None else 0
        self._session.step(
            task,
            *columns,
            loss=pending.loss if pending is not None else None,
            learning_rate=step.facts.learning_rate,
            site=step.site,
            forwards=pending.forwards if pending is not None else Forwards(),
            flags=flags,
            carried=_carried(pending, step.parameters),
        )
        task.fast = [None] * width
        for parameter, position in zip(step.parameters, step.positions, strict=True):
            task.fast[position] = weakref.ref(parameter)
            task.versions[position] = parameter._version
        self._thread.last = (pending, task)

    def _merge(self, step: _Step, task: Task, columns: Sequence[Sequence[Tensor | None]]) -> bool:
        """A second optimizer after the same backward completes the row of the first."""
        if step.pending is not None or self._thread.last is None:
            return False
        if self._thread.last[1] is not task or task.last is None:
            return False
        row = task.last
        for name, values in zip(("before", "after", "gradients"), columns, strict=True):
            kept = list(getattr(row, name))
            if name == "before" and any(
                a is not None and b is not None for a, b in zip(kept, values, strict=True)
            ):
                return False
            setattr(
                row, name, [a if a is not None else b for a, b in zip(kept, values, strict=True)]
            )
        return True

    def _going_on(self, step: _Step) -> Task | None:
        """The open task that a step goes on with: its weights are what the last one left."""
        for optimizer, task in list(self._tasks.items()):
            if task.ended or task.known is not step.known:
                continue
            own = optimizer is step.optimizer or set(step.positions).isdisjoint(task.positions)
            if own and self._unchanged(task, step):
                return task
        return None

    def _task(self, step: _Step) -> Task:
        """The task this in-place step belongs to; a new one where the weights were reset."""
        if step.goes_on is not None and not step.goes_on.ended:
            return step.goes_on
        self._loops.tasks.end_task()
        # (not of self._tasks: the optimizer of the task before may be gone)
        latest = [t for t in self._nesting.tasks if t.known is step.known and t.last is not None]
        goes_on = bool(latest) and self._unchanged(latest[-1], step)
        for task in [t for t in self._tasks.values() if t.known is step.known and not t.ended]:
            self._finish(task)
        base = step.base
        self._adapted.update(
            t.known for t in self._nesting.tasks if t.base is None and not t.provisional
        )
        declared = self._declared_inner(step)
        confirmed = declared or self._copied_before(base) or step.known in self._in_turn.moved
        values = spread(step.before, step.positions, len(step.known.layout.parameters))
        back = self._rollbacks.leads_to(step.optimizer, values)
        if not back:
            self._reptile.begins(step.known, step.positions, step.before)
        task = self._session.start_task(
            step.known,
            "torch.optim",
            step.site,
            base=base,
            provisional=not confirmed,
            optimizer=step.facts.name,
            in_place=True,
            carried_steps=step.carried.steps,
            carried_state=step.carried.state,
            loaded_state=step.optimizer in self._loaded,
            copied=base is not None,
        )
        task.positions, task.in_place = step.positions, True
        self._tasks[step.optimizer] = task
        self._in_turn.adapted |= base is None
        self._loaded.discard(step.optimizer)
        if back:
            self._nesting.goes_back(task)
        else:
            self._nesting.began(task, values, step.parameters, goes_on)
            self._reptile.began(task)
        others = all(step.known.position(parameter) is None for parameter in step.parameters)
        if base is None and others and not task.provisional:
            self._session.models.note_begun_alike(step.known)
        return task

    def _unchanged(self, task: Task, step: _Step) -> bool:
        if task.last is None:
            return True
        if step.disturbed is not None and step.disturbed.first is not None:
            # Where they were before that: to put them back is not exact.
            found = gathered(step.disturbed.first.before, step.positions)
            return all(map(_same, found, gathered(task.last.after, step.positions)))
        if step.positions == task.positions and are_equal(step.before, task.last.after):
            return True
        return all(
            value is None
            or was_left_alone(value, version, task.last.after[place], task.versions.get(place))
            for value, version, place in zip(
                step.before, step.versions, step.positions, strict=True
            )
        )

    def _copied_from(
        self, parameters: list[Tensor], pending: Pending | None
    ) -> tuple[KnownModel | None, list[int]]:
        """The model these parameters were deep-copied from, and their positions in it.

        Of several optimizers each has a part of it: the model is what the backward went through.
        """
        models = self._session.models
        origins = [models.origin_of(parameter) for parameter in parameters]
        present = [origin for origin in origins if origin is not None]
        if len(present) < len(origins) or not present:
            return None, []
        if models.find(present[0]) is None:
            reached = [t for r in pending.inputs if (t := r()) is not None] if pending else []
            whole = [origin for t in reached if (origin := models.origin_of(t)) is not None]
            models.discover([*present, *whole])
            if models.find(present[0]) is None:
                models.discover(present)
        found = [models.find(origin) for origin in present]
        places = [place for place in found if place is not None]
        if len(places) < len(found) or any(place[0] is not places[0][0] for place in places):
            return None, []
        return places[0][0], [place[1] for place in places]

    def _equal_to_base(self, parameters: list[Tensor]) -> tuple[KnownModel, list[int]] | None:
        """The base that parameters begin equal to, value by value: then they are its copies.

        Asked only of what an outer step has moved: before one, either may be the other's copy.
        """
        matched = self._session.models.match(parameters, self._moved)
        if matched is None:
            return None
        known, positions = matched
        origins = [known.parameters[position]() for position in positions]
        pairs = list(zip(parameters, origins, strict=True))
        if any(parameter is origin for parameter, origin in pairs):
            return None  # the base itself
        for parameter, origin in pairs:
            if origin is not None:
                self._session.models.note_copy(parameter, origin)
        return matched

    def _copied_before(self, base: KnownModel | None) -> bool:
        """Whether another copy of the same base was adapted before this one."""
        if base is None:
            return False
        earlier = [task for task in self._nesting.tasks if task.base is base]
        for task in earlier:
            self._session.confirm(task)
        return bool(earlier)

    def _declared_inner(self, step: _Step) -> bool:
        named = vars(sys.modules.get("__main__", sys))
        return any(
            declared is step.optimizer
            or declared in (type(step.optimizer), step.facts.name)
            or (isinstance(declared, str) and named.get(declared) is step.optimizer)
            for declared in self._session.inner
        )

    def _kept(self, module: nn.Module) -> None:
        """The state of a module is asked for, or it is copied."""
        open_ = self._session.adapting(module) if self._tasks else ()
        for optimizer, task in list(self._tasks.items()):
            if any(task is other for other in open_):
                self._rollbacks.note(optimizer, task)

    def _restored(self, task: Task) -> None:
        """The weights a task adapted in place were loaded anew."""
        if any(own is task for own in self._tasks.values()):
            self._finish(task)

    def _finish(self, task: Task) -> None:
        fast = {id(t) for r in task.fast if r is not None and (t := r()) is not None}
        taken = self._session.loose.forwards.take_used_by(lambda weight: id(weight) in fast)
        task.forwards.extend(taken)
        self._session.finish_task(task)

    def close(self) -> None:
        """The run is over."""
        for task in list(self._tasks.values()):
            if not task.ended:
                self._finish(task)  # one copy that was trained, and no other, was fine-tuned


def _same(value: Tensor | None, other: Tensor | None) -> bool:
    """Whether two values are equal (None is no other)."""
    return value is None or other is None or torch.equal(value, other)


def _was_handed(pending: Pending) -> bool:
    """Whether the gradients of a ``grad()`` were made its parameters' ``.grad``, as they are."""
    handed = False
    for reference, gradient in zip(pending.inputs, pending.gradients, strict=True):
        parameter = reference()
        own = parameter.grad if parameter is not None and parameter.is_leaf else None
        if gradient is None or own is None or pending.function != "grad":
            return False
        if not waits_for_nothing(own) or not torch.equal(own, gradient):
            return False
        handed = True
    return handed


def _adapts(task: Task, parameters: Sequence[Tensor]) -> bool:
    """Whether ``parameters`` are the very ones a task adapts, in its order."""
    fast = [task.fast[place] for place in task.positions] if task.fast else []
    return len(fast) == len(parameters) and all(
        reference is not None and reference() is parameter
        for reference, parameter in zip(fast, parameters, strict=True)
    )


def _facts(optimizer: Optimizer) -> OptimizerFacts:
    rate = learning_rate_of(optimizer.param_groups)
    return OptimizerFacts(
        type(optimizer).__name__, rate, lambda: Carried.of(state_values(optimizer.state))
    )


def _carried(pending: Pending | None, parameters: list[Tensor]) -> list[Tensor]:
    """Gradients that were already there, of the parameters this optimizer steps."""
    if pending is None:
        return []
    stepped = {id(parameter) for parameter in parameters}
    return [gradient for leaf, gradient in pending.carried if id(leaf()) in stepped]
