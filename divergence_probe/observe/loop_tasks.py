"""Tasks of loops of no known library: what a gradient turned out to be, once that is settled.

An inner step goes on with its task or begins one; one of the base's own weights in place is an
outer step by hand; a gradient that no update followed is the query's, or the outer step's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from divergence_probe.observe import outer_steps, restarts
from divergence_probe.observe.at_hand import Mark, mark_of
from divergence_probe.observe.capture import Forwards, Number
from divergence_probe.observe.disturbances import are_back, goes_up, is_undone
from divergence_probe.observe.forensics.inputs import made_by
from divergence_probe.observe.in_turn import InTurn
from divergence_probe.observe.line_searches import as_they_are, took_another_length
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.naming import named
from divergence_probe.observe.nesting import Nesting
from divergence_probe.observe.pending import Learned, Pending
from divergence_probe.observe.projections import were_left_alone
from divergence_probe.observe.reptile import Reptile
from divergence_probe.observe.resolution import Update
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import Values, gathered, is_empty, is_whole, spread
from divergence_probe.observe.standstill import settle_standstill
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import address_of, are, identities, physical, references
from divergence_probe.observe.turns import Turns, rely_on
from divergence_probe.record.schema import FLAGS

if TYPE_CHECKING:
    from divergence_probe.observe.following import Follower

# A gradient may be taken twice at one point for a reason; five inner steps take it five times.
_REPETITIONS = 3
_ADAPTERS = {"grad": "autograd.grad", "backward": "backward", "func": "torch.func"}

_UNCOUNTED = (
    "Weights on an accelerator are written through .data, which torch does not count: where they "
    "are put back for the next task shows only in their values, and looking would wait for the "
    "device at every step. Write to them under torch.no_grad() instead, or name tasks with "
    "probe.task()."
)


class LoopThread(threading.local):
    """What one thread is in the middle of; ``states`` keeps every thread's, also after its end."""

    def __init__(self, states: list[dict[str, Any]]) -> None:
        states.append(vars(self))
        self.pending: Pending | None = None
        self.task: Task | None = None
        self.waiting: list[Pending] = []
        self.displaced: Pending | None = None  # its base was written to, and may be put back
        self.follower: Follower | None = None
        #: By line. What one thread steps, another one must not touch: its backward may be writing.
        self.learned: dict[int, Learned] = {}
        self.forwards = Forwards()
        self.extends = False
        self.turns = Turns()
        self.queries: list[float] = []  # of tasks that ended without a gradient of theirs
        self.unused: tuple[object, ...] = ()
        self.repeated = 0


class LoopTasks:
    """The tasks that steps of hand-written loops belong to, one open at a time in each thread."""

    def __init__(self, session: Session, thread: LoopThread) -> None:
        self._session = session
        self._thread = thread
        self._in_place = Nesting(session)
        self.in_turn = InTurn()
        self.reptile = Reptile(session)

    def step(self, pending: Pending, update: Update) -> None:
        """``pending`` led to ``update``: a step of its task, of a new one, or of the base."""
        thread = self._thread
        settle_standstill(pending, update.values)
        self._forget_disturbance(pending)
        if outer_steps.is_one(pending, update):
            self._outer(pending, update)
            return
        if update.in_place and outer_steps.starts_from_where_it_began(pending, update):
            self._outer_put_back(pending, update)
            return
        if pending.learned.unclaimed:
            rely_on(pending.learned, self._session)
        task = pending.task
        if task is None or task.ended or task is not thread.task:
            doubtful = update.in_place and goes_up(pending, update.values)
            task = self.start(pending, update.in_place, doubtful)
        elif task.doubtful:
            self._stands(task)
        task.anchored |= bool(pending.displaced)
        flags = pending.flags
        flags |= 0 if update.certain else FLAGS["uncertain"]
        flags |= 0 if update.complete else FLAGS["incomplete"]
        values: Values = update.values
        if (
            not update.in_place
            and pending.width == 1
            and restarts.starts_over(task, pending, update)
        ):
            values, flags = [None] * len(values), flags | FLAGS["incomplete"]
        self.record(task, pending, values, flags, update.tensors)
        if pending.uncounted and task.data["writes_base"]:
            self._session.unseen(_UNCOUNTED)
        if update.in_place:
            task.marks = {task.positions[i]: mark for i, mark in pending.marks.items()}

    def record(
        self, task: Task, pending: Pending, values: Values, flags: int, made: Values
    ) -> None:
        """An inner step that made ``made``, of the values ``values``."""
        positions, width = task.positions, len(task.known.layout.parameters)
        if task.known.model is None and (last := made[-1] if made else None) is not None:
            task.made_by = made_by([last])
        before: Values = pending.before
        gradients = pending.gradients
        task.inputs = task.fast = references(made)
        if not is_whole(positions, width):
            before, values, gradients = (
                spread(column, positions, width) for column in (before, values, gradients)
            )
            task.fast = [None] * width
            for reference, position in zip(task.inputs, positions, strict=True):
                task.fast[position] = reference
        if pending.clipped:
            self._session.clipped = torch.stack(pending.clipped).any()
        self._session.step(
            task,
            before,
            values,
            gradients,
            loss=pending.loss,
            learning_rate=None,
            site=pending.site,
            forwards=pending.forwards,
            flags=flags,
            width=pending.width,
            carried=[gradient for _, gradient in pending.carried] if pending.carried else (),
        )

    def reorder(self, task: Task, pending: Pending) -> None:
        """Bring a task's positions into the order this gradient was taken in, which may differ.

        (A backward meets leaves in graph order, a ``grad()`` in the order of its list.)
        """
        known = {
            id(tensor): position
            for reference, position in zip(task.inputs, task.positions, strict=True)
            if reference is not None and (tensor := reference()) is not None
        }
        found = [known.get(id(reference())) for reference in pending.inputs]
        if len(found) != len(task.positions) or any(position is None for position in found):
            return
        task.positions = [position for position in found if position is not None]

    def goes_on(self, task: Task, inputs: Sequence[Tensor]) -> bool:
        """Whether the inputs are exactly what the task's last update made, in the same order.

        So it is in almost every step of a loop that makes new tensors; nothing else is asked then.
        """
        if not inputs or task.ended or task.in_place or not are(task.inputs, inputs):
            return False
        return not restarts.is_overwritten(task)

    def continues(self, task: Task, pending: Pending) -> bool:
        """Whether the gradient was taken of the task's own fast weights."""
        if task.ended or not task.inputs:
            return False
        if pending.width > 1:
            return self._continues_batched(task, pending)
        fast = {
            id(t): i for i, r in enumerate(task.inputs) if r is not None and (t := r()) is not None
        }
        inputs = [reference() for reference in pending.inputs]
        if not any(id(tensor) in fast for tensor in inputs):
            return False
        if not task.in_place or task.last is None:
            return not restarts.is_overwritten(task)
        found: list[tuple[Tensor, Mark, Tensor | None, Mark | None]] = []
        places: list[int] = []
        for i, tensor in enumerate(inputs):  # (maybe in another order than the task's own)
            place = fast.get(id(tensor))
            if tensor is None or place is None or place >= len(task.positions):
                continue
            position = task.positions[place]
            left, mark = task.last.after[position], task.marks.get(position)
            found.append((pending.before[i], mark_of(tensor), left, mark))
            places.append(position)
        if not found or were_left_alone(*zip(*found, strict=True)):
            return True
        return took_another_length(task, places, [(now, mark) for now, mark, *_ in found])

    def _continues_batched(self, task: Task, pending: Pending) -> bool:
        """The same inside vmap, whose wrappers die with it: there memory is what stays the same."""
        after = task.last.after if task.last is not None else ()
        left = {t.data_ptr() for t in after if t is not None and t.numel()}
        inputs = [tensor for r in pending.inputs if (tensor := r()) is not None]
        return any(physical(tensor)[0].data_ptr() in left for tensor in inputs)

    def start(self, pending: Pending, in_place: bool, doubtful: bool = False) -> Task:
        """A task begins with the step that ``pending`` is the gradient of.

        Where it is ``doubtful``, that may be undone: see :mod:`.disturbances`.
        """
        session, thread = self._session, self._thread
        self._leave(pending)
        self.settle_waiting()
        tensors = [reference() for reference in pending.inputs]
        copied = self._copied_from(pending) if in_place else None
        known, positions = copied or pending.named or named(session.models, tensors, pending.before)
        own = in_place and any(t is not None and known.position(t) is not None for t in tensors)
        if pending.width == 1 and not doubtful:
            self.reptile.begins(known, positions, pending.before)
        task = session.start_task(
            known,
            _ADAPTERS[pending.function],
            pending.site,
            width=pending.width,
            base=None if own else known,
            provisional=own or copied is not None or doubtful,
            in_place=in_place,
            writes_base=own,
            copied=copied is not None,
        )
        task.positions, task.in_place, task.learned = positions, in_place, pending.learned
        task.origins = pending.leaves
        task.doubtful = doubtful
        models = session.models
        if not in_place and pending.width == 1 and not pending.restarts:
            for tensor in tensors:
                if tensor is not None and tensor.is_leaf:
                    models.note_begun(tensor)
        if not pending.by_identity:
            task.began = [
                ref(t) for t in tensors if t is not None and t.is_leaf and not models.find(t)
            ]
        gone = sum(tensor is None for tensor in tensors)  # (clones, or they would live on)
        clones = len(task.began) + gone == len(tensors) and not pending.restarts
        if not own and copied is None and clones:
            width = len(known.layout.parameters)
            models.note_begun_alike(known, spread(pending.before, positions, width))
        thread.task = task
        if not doubtful:
            self.reptile.began(task)
            self._began_in_place(task, pending.before, tensors)
        return task

    def _leave(self, pending: Pending) -> None:
        """A task begins with ``pending``: the current one is over, or waits for its next turn."""
        thread, task = self._thread, self._thread.task
        by_hand = task if task is not None and not task.ended and not task.in_place else None
        if by_hand is not None and thread.turns.leave(by_hand, pending.learned, self._session):
            thread.task = None
        else:
            self.end_task()

    def turn_to(self, inputs: Sequence[Tensor]) -> None:
        """It is the turn of the task that ``inputs`` are the weights of, if one waits for it."""
        thread = self._thread
        task = thread.turns.take(lambda waiting: self.goes_on(waiting, inputs))
        if task is None:
            return
        if thread.task is not None and not thread.task.ended:
            thread.turns.park(thread.task, self._session)
        thread.task = task

    def _began_in_place(
        self, task: Task, before: Sequence[Tensor | None], tensors: Sequence[Tensor | None]
    ) -> None:
        if task.data["writes_base"]:
            self._session.adapted_by_hand.add(task.known)
        self._in_place.began(task, before, tensors)

    def _stands(self, task: Task) -> None:
        """A doubtful task went on, or ended: what it did was meant."""
        task.doubtful = False
        if not (task.data["writes_base"] or task.data["copied"]):
            self._session.confirm(task)
        if task.first is not None:
            self._began_in_place(task, task.first.before, [t() if t else None for t in task.fast])

    def _forget_disturbance(self, pending: Pending) -> None:
        """A doubtful task's weights were put back before this step: it is one from there."""
        task, back = pending.task, pending.displaced
        if task is None or not task.doubtful or task.first is None or task is not self._thread.task:
            return
        if len(back) < len(pending.inputs) or not all(back.values()):
            return
        self._thread.task = None
        self._session.discard(task)
        pending.task, pending.learned.disturbs = None, True
        pending.named = task.known, task.positions
        pending.before = gathered(task.first.before, task.positions)  # type: ignore[assignment]

    def undone(self, parameters: Sequence[Tensor]) -> Task | None:
        """The task that only disturbed an optimizer's parameters: they are back.

        It was none, and is forgotten.
        """
        task = self._thread.task
        if task is None or not task.doubtful or not is_undone(task, parameters):
            return None
        self._thread.task = None
        self._session.discard(task)
        return task

    def _copied_from(self, pending: Pending) -> tuple[KnownModel, list[int]] | None:
        """The model a task's parameters are deep copies of, and their positions in it."""
        origins = [origin for r in pending.origins or () if (origin := r()) is not None]
        if not origins or len(origins) < len(pending.inputs):
            return None
        return named(self._session.models, origins, origins)

    def end_task(self) -> None:
        """The current task is over; what ran since its last gradient was its query."""
        self.settle_displaced()
        thread = self._thread
        task, thread.task = thread.task, None
        if task is None or task.ended:
            return
        if task.doubtful:
            self._stands(task)
        if task.learned is not None:
            task.learned.task_took(task.steps)
        restarts.drop_if_written(task)
        if task.in_place:
            took_another_length(task, *as_they_are(task))
        task.forwards.extend(self._used_by(task))
        if task.steps and isinstance(task.forwards.loss, float):
            thread.queries.append(task.forwards.loss)
        self._session.finish_task(task)

    def outer_step(self, known: KnownModel) -> None:
        """An optimizer moved a base: its copies that were adapted before it were inner loops."""
        self._in_place.outer_step()
        self.reptile.stepped(known, always=known in self._session.unrolled)

    def _used_by(self, task: Task) -> Forwards:
        """Loose forwards that ran with the task's fast weights (or with none that shows)."""
        forwards = self._session.loose.forwards
        if task.put_back:
            return Forwards()  # what ran since then ran with other weights
        if not forwards.normalizations:
            return forwards.take()
        fast = identities(task.fast)
        return forwards.take_used_by(lambda weight: id(weight) in fast)

    def _outer(self, pending: Pending, update: Update) -> None:
        self.end_task()
        tensors = [reference() for reference in pending.inputs]
        known, positions = pending.named or named(self._session.models, tensors, pending.before)
        width = len(known.layout.parameters)
        moved = [tensor for tensor in tensors if tensor is not None]
        self.moved(moved)
        self._session.bases.difference_update(self._session.models.note_moved(moved))
        self.reptile.stepped(known)
        self._session.outer_step(
            known,
            spread(pending.before, positions, width),
            spread(update.values, positions, width),
            spread(pending.gradients, positions, width),
            learning_rate=None,
            site=pending.site,
            flags=(pending.flags & (FLAGS["rounded"] | FLAGS["zero"]))
            | (FLAGS["incomplete"] if is_empty(pending.gradients) else 0),
            optimizer="",
        )

    def _outer_put_back(self, pending: Pending, update: Update) -> None:
        """The weights of a task were put back to where it began, and moved from there.

        By its gradient, or by a sum that this is a part of: no gradient is recorded.
        """
        assert pending.home is not None
        task, positions = pending.home
        assert task.first is not None
        self._session.confirm(task)
        self.not_a_step(pending)
        pending.named = task.known, positions
        pending.before = gathered(task.first.before, positions)  # type: ignore[assignment]
        pending.gradients = [None] * len(pending.inputs)
        self._outer(pending, update)

    def awaits_step(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a gradient through tasks was taken of ``tensors``, and no step of theirs seen."""
        latest = self._thread.pending
        waiting = [*self._thread.waiting, *([latest] if latest and latest.through else [])]
        return any(pending.reached(tensors) for pending in waiting)

    def moved(self, tensors: Sequence[Tensor]) -> None:
        """``tensors`` were stepped: no gradient of theirs waits for that any more."""
        thread = self._thread
        thread.turns.left = []
        if thread.pending is not None and thread.pending.through:
            thread.pending.through = not thread.pending.reached(tensors)
        if thread.waiting:
            thread.waiting = [waiting for waiting in thread.waiting if not waiting.reached(tensors)]

    def wrote_elsewhere(self, pending: Pending, target: Tensor) -> bool:
        """A gradient went into memory of none of its inputs: an outer step, if it is a base's.

        So first order MAML steps by hand: the gradient is that of the adapted weights.

        Returns:
            Whether it is a base's.
        """
        if pending.base is None:
            task = self._adapting(pending)
            known = task.known if task is not None else pending.named and pending.named[0]
            pending.base = outer_steps.memory_of(known) if known else {}
        place = pending.base.get(address_of(target))
        if place is not None:
            value = physical(target)[0].detach().clone()
            pending.base_written[place] = value, self._session.sites.here()
        return place is not None

    def _adapting(self, pending: Pending) -> Task | None:
        """The task whose adapted weights a gradient was taken of (they may be gone by now)."""
        if pending.task is not None:
            return pending.task if pending.task.steps and not pending.task.ended else None
        origins = [origin for r in pending.origins or () if (origin := r()) is not None]
        found = self._session.models.find(origins[0]) if origins else None
        for task in reversed(self._session.open):
            if found is not None and task.steps and task.base is found[0]:
                return task
        return None

    def wrote_to_base(self, pending: Pending, following: Sequence[Tensor]) -> None:
        """A base was written to with the gradient of its adapted weights: an outer step by hand.

        Unless a gradient of something else is taken there, and the base is put back.

        Args:
            pending: the gradient.
            following: what the next one is taken of, if one is.
        """
        self.settle_displaced()
        task = self._adapting(pending)
        if task is None:
            return
        own = identities(task.known.parameters)
        if following and own.isdisjoint(map(id, following)):
            self._thread.displaced = pending
        else:
            self._outer_elsewhere(pending, task)

    def settle_displaced(self) -> None:
        """Decide what a write to a base was, now that it goes on from where that is."""
        pending, self._thread.displaced = self._thread.displaced, None
        task = self._adapting(pending) if pending is not None else None
        if pending is None or task is None:
            return
        before = outer_steps.columns_of(pending, task)[0]
        moves = [
            (tensor, before[place], after)
            for place, (after, _) in pending.base_written.items()
            if (tensor := task.known.parameters[place]()) is not None
        ]
        if not are_back(moves):
            self._outer_elsewhere(pending, task)

    def _outer_elsewhere(self, pending: Pending, task: Task) -> None:
        """Record the step of a base that was taken with the gradient of its adapted weights.

        That may have been summed up over tasks, or be one of many: no gradient is recorded.
        """
        moved = [t for i in pending.base_written if (t := task.known.parameters[i]()) is not None]
        before, after, site = outer_steps.columns_of(pending, task)
        self._session.confirm(task)
        self.end_task()
        self.moved(moved)
        self._session.bases.difference_update(self._session.models.note_moved(moved))
        self.reptile.stepped(task.known, always=False)  # (or so it was heard this time)
        self._session.outer_step(
            task.known,
            before,
            after,
            [None] * len(after),
            learning_rate=None,
            site=site,
            flags=FLAGS["incomplete"],
            optimizer="",
        )

    def settle_waiting(self) -> None:
        """Record the outer steps that outer gradients led to after the next gradient was taken."""
        for pending, update in outer_steps.taken(self._thread.waiting):
            self._outer(pending, update)

    def not_a_step(self, pending: Pending) -> None:
        """No inner update followed: the gradient was the query's (or the outer step's)."""
        self._count_repetition(pending)
        if pending.through:
            self._thread.waiting = outer_steps.waiting_with(self._thread.waiting, pending)
        if self._thread.task is not None:
            self._thread.task.looked_at = True
        task = self.queried(pending)
        if task is not None and task.steps:
            forwards = self._used_by(task)
            forwards.extend(pending.forwards)
            session, gradients = self._session, []
            if task.in_place:  # of a copy: whether it arrives at the base is another question
                gradients = [gradient for gradient in pending.gradients if gradient is not None]
            loss = self._own_part(pending.loss, forwards.loss)
            task.graph = pending.graph or task.graph
            session.query(task, forwards, loss, pending.site, pending.flags, gradients)
        self._thread.queries.clear()

    def _own_part(self, loss: Number, own: Number) -> Number:
        """A task's own query loss, where the gradient was taken of the sum or mean over several."""
        queries = self._thread.queries
        if not queries or not isinstance(loss, float) or not isinstance(own, float):
            return loss
        total = sum(queries) + own
        several = any(
            math.isclose(loss * times, total, rel_tol=1e-5) for times in (1, len(queries) + 1)
        )
        return own if several else loss

    def _count_repetition(self, pending: Pending) -> None:
        """Note a gradient taken again and again at one point, with the very same loss.

        One that can be differentiated is no unused step: products with a Hessian take it so.
        """
        thread = self._thread
        loss = pending.loss
        inputs = [reference() for reference in pending.inputs]
        if pending.flags & FLAGS["second_order"] or any(tensor is None for tensor in inputs):
            return  # (what a transform wrapped for the call is gone, and its point with it)
        if not inputs:
            return  # an optimizer's: its leaves were not looked for, but it does step
        if pending.escaped or (pending.function == "grad" and not any(pending.candidates)):
            return  # it may have gone where it cannot be followed: who knows what it is used for
        if not isinstance(loss, float):
            return  # it would be waited for, or is that of several tasks
        task = self.queried(pending)
        if task is not None and task.steps and not task.in_place:
            return  # it went through its steps: whoever makes use of it, it is no step of theirs
        # An optimizer that was handed this gradient counts its write, also where nothing moved.
        versions = [tensor._version for tensor in inputs if tensor is not None]
        key = (pending.site, tuple(map(id, inputs)), *versions, loss)
        thread.repeated = thread.repeated + 1 if key == thread.unused else 1
        thread.unused = key
        if thread.repeated == _REPETITIONS:
            times = thread.repeated
            self._session.event(
                "repeated-gradient", self.queried(pending), pending.site, times=times
            )

    def queried(self, pending: Pending) -> Task | None:
        """The task whose query a gradient without an update was taken of."""
        task = self._thread.task
        if task is not None and not task.ended:
            return task
        inputs = identities(pending.inputs or pending.learned.optimizer or ())
        for task in reversed(self._session.open):
            if any(r is not None and id(r()) in inputs for r in task.fast):
                return task
        return None
