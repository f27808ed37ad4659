"""The middle of a task whose loop is known: a gradient that can only be the next step's.

In a loop of five steps, four gradients of five are of this kind, so they are asked the least that
tells them apart and written down in one go. Whatever is not exactly as expected goes the long way
through :mod:`.loops`, which asks everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from time import perf_counter as clock
from weakref import ref

from torch import Tensor

from divergence_probe.observe.capture import NO_FORWARDS, Forwards, Number
from divergence_probe.observe.forensics import investigator_of
from divergence_probe.observe.forensics.checking_mode import sequence_number
from divergence_probe.observe.forensics.inputs import made_by
from divergence_probe.observe.forensics.windows import Window
from divergence_probe.observe.loop_tasks import LoopTasks, LoopThread
from divergence_probe.observe.pending import Pending, number_of
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import Snapshot, Values, pair, shapes_of
from divergence_probe.observe.tensors import IDENTITIES, any_carries_graph
from divergence_probe.record.schema import FLAGS

# Asked of every parameter by C code: a loop over them costs more than all the rest.
_shape, _is_leaf = attrgetter("shape"), attrgetter("is_leaf")
_PLAIN = {Tensor}
_NO_COPIES = (False, False)


class KnownLoops:
    """Steps of loops whose course is known: :meth:`expects` tells them, :meth:`went_on` notes them.

    Args:
        session: takes the steps.
        thread: what the thread is in the middle of.
        tasks: the tasks of its loops.
        wait_for: follows the update after a gradient, as the last of a task needs.
        foreign_to: tells weights of other tasks than that of the given inputs.
    """

    def __init__(
        self,
        session: Session,
        thread: LoopThread,
        tasks: LoopTasks,
        wait_for: Callable[[Pending, Tensor | None, Sequence[Tensor], Values], None],
        foreign_to: Callable[[Sequence[Tensor]], Callable[[Tensor], bool]],
    ) -> None:
        self._session = session
        self._guard = session.guard
        self._thread = thread
        self._tasks = tasks
        self._forensics = investigator_of(session)
        self._wait_for = wait_for
        self._foreign_to = foreign_to

    def expects(
        self, site: int, function: str, loss: Tensor | None, inputs: Sequence[Tensor]
    ) -> bool:
        """Whether a gradient about to be taken can only be the next step of a known loop.

        Then :meth:`went_on` is all that is called. Asked in the user's own surroundings, where
        nothing stands between us and plain tensors.

        Args:
            site: number of its line.
            function: how it is taken.
            loss: what it is taken of; None where that is still to be computed.
            inputs: what it is taken with respect to; of no transform.
        """
        started, guard = clock(), self._guard
        try:
            pending = self._thread.pending
            if (
                pending is None
                or not pending.in_the_middle
                or pending.site != site
                or pending.function != function
                or not self._forensics.calm(site, loss, self._value_of(loss))
            ):
                return False
            opened = self._session.open
            if opened and (len(opened) > 1 or opened[0] is not self._thread.task):
                return False  # this may be the query of another task
            return _are_made(pending, loss, inputs)
        except Exception as error:
            guard.fail(error)
            return False
        finally:
            guard.spent += clock() - started

    def went_on(
        self,
        loss: Tensor | None,
        inputs: Sequence[Tensor],
        gradients: Values,
        before: int,
        after: int,
    ) -> bool:
        """The expected gradient was taken: its inputs are what the update before it made.

        Args:
            loss: what it was taken of.
            inputs: what it was taken with respect to.
            gradients: what came of it.
            before: number of the next autograd node when it began.
            after: the same when it ended.

        Returns:
            False, and nothing is done, where that update was settled in the meantime.
        """
        thread = self._thread
        pending = thread.pending
        if pending is None:
            return False
        value, forwards = self._forwards_of(loss, inputs)  # (what is left is the last task's query)
        task = pending.task
        if task is None or task.ended or task is not thread.task:
            task = pending.task = self._tasks.start(pending, in_place=False)
        values, slopes = pair(inputs, gradients, _NO_COPIES, like=pending.before)
        learned = pending.learned
        learned.confirmed += 1
        self._tasks.record(task, pending, values, pending.flags, inputs)
        pending.inputs = list(task.inputs)  # type: ignore[arg-type]
        pending.before = values  # type: ignore[assignment]
        pending.gradients = slopes
        second_order = any_carries_graph(gradients)
        pending.flags = (FLAGS["second_order"] if second_order else 0) | learned.flags
        pending.loss_of = ref(loss) if loss is not None else None
        pending.loss, pending.forwards = value, forwards
        if forwards is not NO_FORWARDS:
            self._session.name_forwards(forwards, task.known, task)
        pending.made_by = made_by(inputs)
        pending.ended = sequence_number()
        window = Window(pending.site, pending.made_by, before, after)
        self._forensics.passed(window, task, task.steps)
        if task.steps + 1 >= (learned.steps or 0) or type(slopes) is not Snapshot:
            self._wait_for(pending, loss, inputs, gradients)
        return True

    def _value_of(self, loss: Tensor | None) -> Number:
        """The value of a loss that has just been computed by torch's own function for it."""
        losses = self._session.loose.forwards.losses
        call = losses[-1] if losses else None
        return call.value if call is not None and call.tensor() is loss else None

    def _forwards_of(
        self, loss: Tensor | None, inputs: Sequence[Tensor]
    ) -> tuple[Number, Forwards]:
        """The value of the loss a gradient was taken of, and what ran forward for it."""
        forwards = self._session.loose.forwards
        if not forwards.only_a_loss:
            return number_of(loss), forwards.split_for(loss, self._foreign_to(inputs))
        value = self._value_of(loss)
        forwards.losses.clear()
        return number_of(loss) if value is None else value, NO_FORWARDS


def _are_made(pending: Pending, loss: Tensor | None, inputs: Sequence[Tensor]) -> bool:
    """Whether inputs are new tensors, made by operations, alike those of the gradient before."""
    if not inputs or inputs[0] is pending.inputs[0]():
        return False
    if loss is not None and pending.loss_of is not None and pending.loss_of() is loss:
        return False
    if set(map(type, inputs)) != _PLAIN or True in map(_is_leaf, inputs):
        return False
    before = pending.before
    shapes = before.shapes if isinstance(before, Snapshot) else tuple(shapes_of(before))
    if tuple(map(_shape, inputs)) != shapes:
        return False
    learned, node = pending.learned, inputs[-1].grad_fn
    assert node is not None
    if learned.script is None:  # which operation takes the parameter is not known
        return node.name() not in IDENTITIES
    made = node._sequence_nr() - pending.ended, type(node)
    if made == learned.made:  # by the same operation, as many after the gradient as before
        return True
    leads = pending.leads_to(inputs[-1])
    learned.made = made if leads else None
    return leads
