"""Loops of no known library: from gradient calls and updates to tasks, inner steps and queries.

Identity tells the story. A gradient taken of the tensors the last update made goes on with the same
task; one taken of anything else begins a new one; one that no update follows is the query's, or the
outer step's. Where an update works in place, the same tensors stay: then a value that changed
between two steps by other means is a restored base, and begins a new task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped

from divergence_probe.observe import outer_steps, restarts
from divergence_probe.observe.capture import Forwards
from divergence_probe.observe.following import Follower
from divergence_probe.observe.forensics.checking_mode import sequence_number
from divergence_probe.observe.forensics.inputs import made_by
from divergence_probe.observe.in_turn import Point
from divergence_probe.observe.known_loops import KnownLoops
from divergence_probe.observe.loop_tasks import LoopTasks, LoopThread
from divergence_probe.observe.models import base_among
from divergence_probe.observe.naming import named
from divergence_probe.observe.pending import Learned, Pending
from divergence_probe.observe.resolution import Update, resolve
from divergence_probe.observe.retention import watched
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import (
    Values,
    are_whole,
    gathered,
    is_empty,
    kept,
    pair,
    shapes_of,
    snapshot,
)
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import any_carries_graph, base_of, batched, leaves, physical
from divergence_probe.record.schema import FLAGS

_NOT_SEEN = "the weights after a task's last step were not seen."
_ESCAPED = (
    f"An update left torch (.numpy()) or was compiled: {_NOT_SEEN} Keep the update in eager torch "
    "operations to see them."
)
_UNMAPPED = (
    f"Gradients of many tasks left the vmap they were taken in: {_NOT_SEEN} Make the update inside "
    "of the vmap to see them."
)


class Loops:
    """Follows every gradient call that no library adapter has claimed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._states: list[dict[str, Any]] = []
        self._thread = LoopThread(self._states)
        self.tasks = LoopTasks(session, self._thread)
        self.known = KnownLoops(session, self._thread, self.tasks, self._wait_for, self._foreign_to)
        session.closing.append(self.close)
        session.restoring.append(self._restored)
        session.starting.append(self.settle_outer)

    @property
    def pending(self) -> Pending | None:
        """The gradient this thread waits to see the update of."""
        return self._thread.pending

    @property
    def is_open(self) -> bool:
        """Whether this thread is in, or was last in, a task that makes new tensors."""
        task = self._thread.task
        return task is not None and not task.in_place

    def learned_at(self, site: int) -> Learned:
        """What this thread knows of the gradients taken at a line."""
        known = self._thread.learned
        learned = known.get(site)
        if learned is None:
            learned = known[site] = Learned()
        return learned

    def stop_following(self) -> None:
        """A gradient is about to be taken: the update before it is complete by now."""
        if self._thread.follower is not None:
            self._thread.follower.stop()

    def keeping_gradients(self, loss: Tensor | None) -> list[Tensor]:
        """What the last update made, where a backward of ``loss`` puts gradients into that.

        (Tensors that are no leaves have a ``.grad`` where ``retain_grad()`` asked for it.)
        """
        pending = self._thread.pending
        if loss is None or pending is None or pending.function != "backward":
            return []
        made = [
            next(
                (t for c in options[::-1] if (t := c.tensor()) is not None and t.retains_grad), None
            )
            for options, gradient in zip(pending.candidates, pending.gradients, strict=False)
            if gradient is not None
        ]
        kept = [tensor for tensor in made if tensor is not None]
        if not kept or len(kept) < len(made):
            return []
        nodes = {tensor.grad_fn for tensor in kept}
        return kept if outer_steps.reaches(loss.grad_fn, nodes, set()) else []

    def opening(
        self,
        site: int,
        function: str,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        adds: bool = False,
    ) -> None:
        """A gradient is about to be taken: what was being followed is complete by now.

        Args:
            site: number of its line.
            function: ``"grad"``, ``"backward"`` or ``"func"``.
            loss: what it is taken of.
            inputs: what it is taken with respect to.
            adds: whether a backward will add to gradients that are there already.
        """
        thread = self._thread
        thread.forwards = self._session.loose.forwards.split_for(loss, self._foreign_to(inputs))
        pending = thread.pending
        thread.extends = pending is not None and self._extends(
            pending, function, loss, inputs, adds
        )
        if not thread.extends:
            if thread.follower is not None:
                thread.follower.stop()
            if pending is not None and _is_mapped(pending, thread.task, loss):
                self.take_pending()
                self.tasks.not_a_step(pending)
            self.settle(inputs, elsewhere=pending is not None and pending.site != site)

    def gradient(
        self,
        site: int,
        function: str,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        *,
        carried: Sequence[tuple[Tensor, Tensor]] = (),
        point: Point | None = None,
    ) -> None:
        """The gradient was taken of ``loss`` with respect to ``inputs``."""
        if len(inputs) != len(gradients):
            return
        thread = self._thread
        forwards, thread.forwards = thread.forwards, Forwards()
        pending = thread.pending
        if thread.extends and pending is not None:
            pending.forwards.extend(forwards)
            self._extend(pending, loss, inputs, gradients)
        else:
            pending = self._begin(site, function, loss, inputs, gradients, forwards)
            pending.carried = [(ref(leaf), gradient) for leaf, gradient in carried]
            pending.point = point
        self._wait_for(pending, loss, inputs, gradients)

    def retained(self, loss: Tensor | None) -> None:
        """The graph of the gradient just taken was told to be left whole."""
        graph, pending = watched(loss) if loss is not None else None, self._thread.pending
        if pending is not None:
            pending.graph = graph
        task = self._session.of_library()
        if task is not None and task.steps:
            task.graph = graph

    def _wait_for(
        self,
        pending: Pending,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """A gradient was taken: what becomes of it is still to be seen."""
        thread = self._thread
        thread.pending = pending
        if pending.inputs and not any(gradient is not None for gradient in gradients):
            self._runs_base_weights(loss, inputs)
        following = self._needs_following(pending)
        pending.in_the_middle = not following and _is_plain(pending)
        if following:
            if thread.follower is None:
                thread.follower = Follower(self._session.guard, self.tasks.wrote_elsewhere)
            thread.follower.follow(pending, gradients)

    def _runs_base_weights(self, loss: Tensor | None, inputs: Sequence[Tensor]) -> None:
        """No parameter got a gradient: note where the loss depends on what they are copies of."""
        models = self._session.models
        origins = [models.origin_of(t) if t.is_leaf else base_of(t) for t in inputs]
        bases = [origin for origin in origins if origin is not None]
        if loss is None or not bases:
            return
        reached = {id(leaf) for leaf in leaves(loss)}
        if any(id(base) in reached for base in bases):
            self._session.runs_base_weights(bases, self._session.sites.here())

    def _begin(
        self,
        site: int,
        function: str,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        forwards: Forwards,
    ) -> Pending:
        learned = self.learned_at(site)
        made = _there(gradients)
        wrapped = any(map(is_wrapped, inputs)) or any(map(is_wrapped, made))
        width = max(physical(t)[1] for t in (*inputs, *made)) if wrapped else 1
        if self._thread.turns.parked and width == 1:
            self.tasks.turn_to(inputs)
        task = self._thread.task
        goes_on = width == 1 and task is not None and self.tasks.goes_on(task, inputs)
        # An in-place update would overwrite what an alias shows; functional ones leave it alone.
        copy = learned.functional is not True and function != "func"
        before, slopes = self._values(inputs, gradients, width, wrapped, copy, goes_on)
        pending = Pending(
            site=site,
            function=function,
            inputs=list(map(ref, inputs)),
            before=before,
            gradients=slopes,
            forwards=forwards,
            learned=learned,
            flags=(FLAGS["second_order"] if any_carries_graph(made) else 0) | learned.flags,
            width=width,
            made_by=made_by(inputs) if not wrapped else -1,
            ended=sequence_number(),
        )
        pending.set_loss(loss)
        self._place(pending, inputs, goes_on)
        return pending

    def _values(
        self,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        width: int,
        wrapped: bool,
        copy: bool,
        goes_on: bool,
    ) -> tuple[Sequence[Tensor], Values]:
        """Values of what a gradient is taken of, and its own, safe from what the user does next."""
        # A leaf may be the base, which an outer step overwrites before it is measured.
        leaf = any(tensor.is_leaf for tensor in inputs)
        if wrapped:
            values = _unbatched(inputs, width, copy or leaf)
            slopes = _unbatched(gradients, width, copy)
        elif leaf and len(inputs) == len(gradients):
            values, slopes = pair(inputs, gradients, (True, copy))
        else:
            task, known = self._thread.task, None
            if goes_on and not copy and task is not None and task.last is not None:
                known = gathered(task.last.after, task.positions)
            if known is None or not are_whole(known):  # (what the last update made is detached)
                known = snapshot(inputs, copy or leaf)
            values, slopes = known, snapshot(gradients, copy)
        assert are_whole(values)
        return values, slopes

    def _foreign_to(self, inputs: Sequence[Tensor]) -> Callable[[Tensor], bool]:
        """Tells weights of another open task from those a gradient of ``inputs`` can go through."""
        if not self._session.loose.forwards.normalizations:
            return lambda weight: False  # asked of nothing
        own = {id(tensor) for tensor in inputs}
        others: set[int] = set()
        for task in self._session.open if inputs else ():
            others |= {id(t) for r in task.fast if r is not None and (t := r()) is not None}
        return lambda weight: id(weight) in others and id(weight) not in own

    def _place(self, pending: Pending, inputs: Sequence[Tensor], goes_on: bool) -> None:
        """Note the task it goes on with, or the model it begins with, while the inputs live."""
        if len(inputs) < len(pending.inputs):
            return  # one call a parameter, and an earlier one's is gone already
        task = self._thread.task
        if goes_on:
            pending.task = task
        elif task is not None and self.tasks.continues(task, pending):
            pending.task = task
            self.tasks.reorder(task, pending)
        elif task is not None:
            task.looked_at = True
        if pending.task is None and inputs:
            turns = self._thread.turns
            if turns.left or pending.learned.unclaimed:
                turns.are_taken(pending.learned, inputs, self._session)
            pending.adapting = self._adapting(inputs)
            models = self._session.models
            before = restarts.restarted(task, inputs)
            pending.restarts = before is not None
            pending.named = before or models.find_all(inputs)
            pending.by_identity = before is None and pending.named is not None
            if pending.named is None:
                pending.named = named(models, inputs, inputs)
            # An in-place update of these is an outer step by hand.
            pending.of_base = (
                any(map(models.begun, inputs))
                or base_among(self._session.unrolled, inputs) is not None
            )
            bases = [None if tensor.is_leaf else base_of(tensor) for tensor in inputs]
            both = zip(inputs, bases, strict=True)
            pending.leaves = [ref(tensor if base is None else base) for tensor, base in both]
            if (adapted := task or self._session.of_library()) is not None:
                outer_steps.note_through(pending, adapted, inputs)
            origins = models.origins_of(inputs)
            pending.origins = list(map(ref, origins)) if origins is not None else None
        known = pending.task.known if pending.task else pending.named and pending.named[0]
        if known:
            self._session.name_forwards(pending.forwards, known, pending.task)

    def _adapting(self, inputs: Sequence[Tensor]) -> Task | None:
        """The open task in which an optimizer adapts all of ``inputs`` in place."""
        for task in reversed(self._session.open):
            if task.in_place and task.steps and task is not self._thread.task:
                places = task.places()
                if all(id(tensor) in places for tensor in inputs):
                    return task
        return None

    def _extends(
        self,
        pending: Pending,
        function: str,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        adds: bool,
    ) -> bool:
        """Whether the same step goes on: one ``grad()`` a parameter, or accumulation."""
        if pending.function != function or function == "func":
            return False
        if function == "grad":
            same_loss = loss is not None and pending.loss_of is not None
            same_loss = same_loss and pending.loss_of() is loss  # type: ignore[misc]
            return same_loss and all(pending.is_input(tensor) is None for tensor in inputs)
        same_inputs = len(inputs) == len(pending.inputs) and all(
            reference() is tensor for reference, tensor in zip(pending.inputs, inputs, strict=True)
        )
        return adds and same_inputs and not pending.updated and not pending.escaped

    def _extend(
        self,
        pending: Pending,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        if pending.function == "backward":
            pending.gradients = snapshot(gradients, copy=True)
            pending.flags |= FLAGS["accumulated"]
            total = pending.loss
            pending.set_loss(loss)
            both = total is not None and pending.loss is not None
            pending.loss = total + pending.loss if both else total  # type: ignore[operator]
            return
        pending.learned.piecewise = True
        before, made = list(pending.before), list(pending.gradients)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            pending.inputs.append(ref(tensor))
            before.append(kept(batched(tensor, pending.width), copy=True))
            made.append(
                kept(batched(gradient, pending.width), copy=True) if gradient is not None else None
            )
        pending.before, pending.gradients = before, made
        present = [t for r in pending.inputs if (t := r()) is not None]
        task = self._thread.task
        goes_on = pending.width == 1 and task is not None and self.tasks.goes_on(task, present)
        self._place(pending, present, goes_on)

    def _needs_following(self, pending: Pending) -> bool:
        """Whether the update must be watched as it happens.

        Not where an optimizer takes the step (its hooks are exact). Not in the middle of a
        functional task whose length is known: there the next gradient call shows the update.
        """
        learned = pending.learned
        if learned.optimizer is not None or not pending.inputs:
            return False
        if learned.piecewise or pending.function == "backward":
            # The next call shows one parameter's update only, or shows them in another order.
            return True
        task = self._thread.task
        if learned.is_known_by_heart and learned.steps is not None:
            position = task.steps if task is not None and pending.task is task else 0
            return position >= learned.steps - 1
        return True

    # -- what it was ------------------------------------------------------------------------------

    def take_pending(self) -> Pending | None:
        """An optimizer takes the step: the pending gradient is its own."""
        pending, self._thread.pending = self._thread.pending, None
        if self._thread.follower is not None:
            self._thread.follower.stop()
        return pending

    def settle_outer(self) -> None:
        """An outer step by hand that was seen is complete where a task begins without a gradient.

        (A library's tasks do: its gradients are its own.)
        """
        pending = self._thread.pending
        if pending is not None and pending.of_base and any(pending.writes):
            self.settle()

    def settle(self, following: Sequence[Tensor] = (), elsewhere: bool = False) -> None:
        """Decide what the pending gradient was, given what the next one is taken of (if any)."""
        pending = self.take_pending()
        if pending is None:
            return
        update = resolve(pending, following, self._session.models, elsewhere)
        if update is not None:
            self.tasks.step(pending, update)
        elif pending.inputs and pending.learned.functional and not pending.followed:
            # A step of a loop that ended earlier than the ones before: its result was not seen.
            pending.learned.steps = pending.learned.previous_steps = None
            nothing: list[Tensor | None] = [None] * len(pending.inputs)
            self.tasks.step(pending, Update(list(nothing), list(nothing)))
        elif pending.left_torch or (pending.learned.unmaps and not any(pending.candidates)):
            nothing = [None] * len(pending.inputs)
            self._session.unseen(_ESCAPED if pending.escaped else _UNMAPPED)
            self.tasks.step(pending, Update(list(nothing), list(nothing)))
        else:
            self.tasks.not_a_step(pending)
            if pending.base_written:
                self.tasks.wrote_to_base(pending, following)

    def _restored(self, task: Task) -> None:
        """The weights a task adapted in place were loaded anew."""
        pending = self._thread.pending
        if pending is not None and pending.task is task and pending.stands:
            return  # what was loaded is the update: that is how this loop takes its step
        if pending is not None and pending.task is task and pending.is_put_back:
            task.put_back = True  # an outer step by hand may follow, with this gradient
            return
        if task is self._thread.task:
            self.settle()
            self.tasks.end_task()

    def close(self) -> None:
        """The run is over, in every thread: what another one left pending is settled here."""
        self.stop_following()
        for state in list(self._states):
            vars(self._thread).update({**state, "follower": None})
            self.settle()
            self.tasks.end_task()
            self.tasks.settle_waiting()

    def leave(self) -> None:
        """Nothing of ours stays on the mode stack, not even where the probe failed half-way."""
        if self._thread.follower is not None:
            self._thread.follower.stop()


def _is_mapped(pending: Pending, latest: Task | None, output: Tensor | None) -> bool:
    """Whether a gradient was taken only to compute a step anew that is then differentiated itself.

    Reverse, fixed-point and implicit hypergradients go through a loop's steps once more, one by
    one, from iterates they kept: each looks like the first step of a task. A loss is one number;
    what they differentiate is as large as the weights.

    Args:
        pending: the gradient.
        latest: the last task: of the same line, and of several steps.
        output: what the next gradient is taken of.
    """
    return (
        output is not None
        and output.numel() > 1
        and pending.function == "grad"
        and pending.task is None
        and latest is not None
        and latest.learned is pending.learned
        and latest.steps > 1
        and output.shape in shapes_of(pending.before)
    )


def _is_plain(pending: Pending) -> bool:
    """Whether what the next gradient is taken of tells it: no optimizer steps, no vmap."""
    return (
        pending.width == 1
        and pending.learned.optimizer is None
        and bool(pending.inputs)
        and not pending.candidates
        and not is_empty(pending.gradients)
    )


def _there(values: Values) -> list[Tensor]:
    return [value for value in values if value is not None]


def _unbatched(tensors: Values, width: int, copy: bool) -> Values:
    """The same out of a transform, where memory is what tells one step's result from another's."""
    return [kept(batched(t, width), copy) if t is not None else None for t in tensors]
