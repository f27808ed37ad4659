"""Tasks of optimizers that step in place: which one a step goes on with, and where one begins."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from divergence_probe.observe.at_hand import (
    mark_of,
    no_difference,
    worth_a_wait,
)
from divergence_probe.observe.capture import Forwards
from divergence_probe.observe.loops import Loops
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.nesting import Nesting
from divergence_probe.observe.optimizer_facts import Step
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.projections import are_mostly_left, were_left_alone
from divergence_probe.observe.rollbacks import Rollbacks
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import are_equal, are_whole, gathered, is_empty, spread
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import identities

Columns = Sequence[Sequence[Tensor | None]]


class _Thread(threading.local):
    """The gradient and the task of a thread's latest inner step."""

    last: tuple[Pending | None, Task] | None = None


_ADAPTER = "torch.optim"
# Tasks of one model that may go on beside each other.
_MOST_BESIDE = 32


class InPlaceTasks:
    """The inner loops that optimizers run in place, on copies or on one model.

    Attributes:
        of: the latest task of each optimizer.
        adapted: what was adapted in place, in inner loops that are known to be such.
    """

    def __init__(self, session: Session, loops: Loops) -> None:
        self._session = session
        self._loops = loops
        self._in_turn, self._reptile = loops.tasks.in_turn, loops.tasks.reptile
        self.of: weakref.WeakKeyDictionary[Any, Task] = weakref.WeakKeyDictionary()
        self.adapted: weakref.WeakSet[KnownModel] = weakref.WeakSet()
        self._nesting = Nesting(session)
        self._taking_turns: weakref.WeakSet[KnownModel] = weakref.WeakSet()
        self._rollbacks = Rollbacks()
        self._loaded: weakref.WeakSet[Any] = weakref.WeakSet()
        self._thread = _Thread()
        session.closing.append(self.close)
        session.restoring.append(self._restored)
        session.keeping.append(self._kept)

    @property
    def latest(self) -> Sequence[Task]:
        """The last few tasks of all optimizers, in order."""
        return self._nesting.tasks

    def state_loaded(self, optimizer: Any) -> None:
        """A state put into an optimizer is meant to be there when its next task begins."""
        self._loaded.add(optimizer)

    def outer_step(self) -> None:
        """A base was moved: copies that were trained before were inner loops."""
        self._nesting.outer_step()

    def is_declared(self, step: Step) -> bool:
        """Whether the user has said that a step's optimizer is an inner one."""
        named = vars(sys.modules.get("__main__", sys))
        return any(
            declared is step.optimizer
            or declared in (type(step.optimizer), step.facts.name)
            or (isinstance(declared, str) and named.get(declared) is step.optimizer)
            for declared in self._session.inner
        )

    def step(self, step: Step, columns: Columns) -> None:
        """An inner step was taken, with these values before and after it, and gradients."""
        if step.base is None and is_empty(step.gradients):
            return  # an optimizer that moves nothing takes no step
        task = self._task_of(step)
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
        task.fast = [None] * len(step.known.layout.parameters)
        for parameter, position in zip(step.parameters, step.positions, strict=True):
            task.fast[position] = weakref.ref(parameter)
            task.marks[position] = mark_of(parameter)
        self._thread.last = (pending, task)

    def _merge(self, step: Step, task: Task, columns: Columns) -> bool:
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
        pending = self._thread.last[0]
        row.carried = [*row.carried, *_carried(pending, step.parameters)]
        if pending is not None and pending.learned.optimizer is not None:
            # (whose gradients the next backward is asked about, too)
            known = identities(pending.learned.optimizer)
            others = [parameter for parameter in step.parameters if id(parameter) not in known]
            pending.learned.optimizer += map(weakref.ref, others)
        return True

    def going_on(self, step: Step) -> Task | None:
        """The open task that a step goes on with: its weights are what the last one left."""
        mine = threading.get_ident()
        for optimizer, task in list(self.of.items()):
            if task.ended or task.known is not step.known or task.thread != mine:
                continue
            own = optimizer is step.optimizer or set(step.positions).isdisjoint(task.positions)
            if own and self._unchanged(task, step):
                if self._nesting.tasks and task is not self._nesting.tasks[-1]:
                    self._taking_turns.add(task.known)
                return task
        return None

    def _task_of(self, step: Step) -> Task:
        """The task this in-place step belongs to; a new one where the weights were reset."""
        if step.goes_on is not None and not step.goes_on.ended:
            return step.goes_on
        self._loops.tasks.end_task()
        # (not of self.of: the optimizer of the task before may be gone)
        latest = [t for t in self._nesting.tasks if t.known is step.known and t.last is not None]
        goes_on = bool(latest) and self._unchanged(latest[-1], step)
        self._end_others(step)
        self._session.loose.forwards.take()  # what is left ran before this task, and is none's
        base = step.base
        self.adapted.update(
            t.known for t in self._nesting.tasks if t.base is None and not t.provisional
        )
        declared = self.is_declared(step)
        confirmed = declared or self._copied_before(base) or step.known in self._in_turn.moved
        values = spread(step.before, step.positions, len(step.known.layout.parameters))
        back = self._rollbacks.leads_to(step.optimizer, values)
        if not back:
            self._reptile.begins(step.known, step.positions, step.before)
        task = self._session.start_task(
            step.known,
            _ADAPTER,
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
        task.optimizer = weakref.ref(step.optimizer)
        self.of[step.optimizer] = task
        self._in_turn.adapted |= base is None
        self._loaded.discard(step.optimizer)
        if back:
            self._nesting.goes_back(task)
        else:
            self._nesting.began(task, values, step.parameters, goes_on)
            self._reptile.began(task)
        self._note_beside(step)
        others = all(step.known.position(parameter) is None for parameter in step.parameters)
        if base is None and others and not task.provisional:
            self._session.models.note_begun_alike(step.known, values)
        return task

    def _note_beside(self, step: Step) -> None:
        """Note what a task's first gradient reached beside its weights, where shapes name them."""
        if step.pending is not None and step.known.model is None:
            own = set(map(id, step.parameters))
            reached = (t for r in step.pending.inputs if (t := r()) is not None)
            self._session.models.note_beside(t for t in reached if id(t) not in own)

    def _is_apart(self, task: Task, step: Step) -> bool:
        """Whether a task goes on beside a step: in another thread, or on weights of its own.

        (Copies of one model that are adapted step by step in turn; two players, each with an
        optimizer and weights that no module owns.)
        """
        if task.thread != threading.get_ident():
            return _is_alive(task.thread)
        if step.known.model is not None and task.base is None:
            return False  # the model's own
        turns = task.base is not None or task.provisional or task.known in self._taking_turns
        alive = task.optimizer is not None and task.optimizer() is not None
        return turns and alive and identities(task.fast).isdisjoint(map(id, step.parameters))

    def _end_others(self, step: Step) -> None:
        """A task begins: those before it are over, but for a few that may go on beside it."""
        beside = 0
        for task in reversed([t for t in self._open() if t.known is step.known]):
            self._collect(task)
            apart = self._is_apart(task, step)
            beside += apart
            if not apart or beside > _MOST_BESIDE:
                self._session.finish_task(task)

    def _unchanged(self, task: Task, step: Step) -> bool:
        last = task.last  # (another thread may end it at any moment)
        if last is None:
            return True
        if step.disturbed is not None and step.disturbed.first is not None:
            # Where they were before that: to put them back is not exact.
            found = gathered(step.disturbed.first.before, step.positions)
            return no_difference(found, gathered(last.after, step.positions), worth_a_wait)
        if step.positions == task.positions and are_equal(step.before, last.after):
            return True
        left = gathered(last.after, step.positions)
        marks = [task.marks.get(place) for place in step.positions]
        if not are_whole(step.before):
            return False
        if were_left_alone(step.before, step.marks, left, marks):
            return True
        began = gathered(task.first.before, step.positions) if task.first is not None else left
        return are_mostly_left(step.before, left, began)

    def _copied_before(self, base: KnownModel | None) -> bool:
        """Whether another copy of the same base was adapted before this one."""
        if base is None:
            return False
        earlier = [task for task in self._nesting.tasks if task.base is base]
        for task in earlier:
            self._session.confirm(task)
        return bool(earlier)

    def _kept(self, module: nn.Module) -> None:
        """The state of a module is asked for, or it is copied."""
        open_ = self._session.adapting(module) if self.of else ()
        for optimizer, task in list(self.of.items()):
            if any(task is other for other in open_):
                self._rollbacks.note(optimizer, task)

    def _restored(self, task: Task) -> None:
        """The weights a task adapted in place were loaded anew."""
        if any(own is task for own in self._open()):
            self._finish(task)

    def _open(self) -> list[Task]:
        """Tasks of optimizers that are not over; their optimizers may be gone."""
        return [t for t in self._session.open if t.in_place and t.adapter == _ADAPTER]

    def _finish(self, task: Task) -> None:
        self._collect(task)
        self._session.finish_task(task)

    def _collect(self, task: Task) -> None:
        """What ran forward on a task's weights since its last step is its own."""
        fast = identities(task.fast)
        taken = self._session.loose.forwards.take_used_by(lambda weight: id(weight) in fast)
        task.forwards.extend(taken)

    def close(self) -> None:
        """The run is over."""
        for task in self._open():
            self._finish(task)  # one copy that was trained, and no other, was fine-tuned


def _is_alive(thread: int) -> bool:
    return any(other.ident == thread for other in threading.enumerate())


def _carried(pending: Pending | None, parameters: list[Tensor]) -> list[Tensor]:
    """Gradients that were already there, of the parameters this optimizer steps."""
    if pending is None:
        return []
    stepped = {id(parameter) for parameter in parameters}
    return [gradient for leaf, gradient in pending.carried if id(leaf()) in stepped]
