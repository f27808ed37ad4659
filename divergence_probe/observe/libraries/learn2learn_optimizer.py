"""learn2learn's ``LearnableOptimizer``: each ``step()`` is an inner step, in the user's own module.

A step puts new tensors into the module: the old ones, detached, plus what a learned transform makes
of their ``.grad``. So weights go on from step to step, while the graph through them reaches one
step back and no further: what the next loss gives a gradient to is the transform, and an outer
optimizer moves that.

A task is what lies between two steps of the outer optimizer (as betty's is): that much was done
with one and the same transform, and of that the outer gradient tells. Hypergradient descent steps
both once a batch: tasks of one step, each with the next batch's loss as its query. The weights are
meant to go on from one task to the next. A task ends as well where they do not go on, because the
module was given other tensors or other values. Without an outer optimizer all is one task.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from divergence_probe.observe.at_hand import mark_of, was_left_alone
from divergence_probe.observe.capture import Forwards, Number
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.optimizers import watching
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import Values, snapshot
from divergence_probe.observe.task import Task
from divergence_probe.record.schema import FLAGS

LIBRARY = "learn2learn.optim.learnable_optimizer"


def install(patches: Patches, session: Session) -> None:
    """Watch the steps of ``LearnableOptimizer``."""
    from learn2learn.optim.learnable_optimizer import LearnableOptimizer

    patches.set_attribute(LearnableOptimizer, "step", _Optimizers(session).step)


@dataclass
class _Loop:
    """What is known of one optimizer.

    Attributes:
        model: what it moves.
        known: the same, as named.
        transform: what its outer optimizer moves.
        task: the task it is in, ended or not.
        spent: the backward that the outer optimizer used before the step that it is for.
    """

    model: weakref.ref[nn.Module]
    known: KnownModel
    transform: KnownModel
    task: Task | None = None
    spent: Pending | None = None


@dataclass
class _Step:
    """A step in progress: what it is about to use."""

    loop: _Loop
    tensors: list[Tensor]
    before: Values
    gradients: Values
    pending: Pending | None
    goes_on: bool


class _Optimizers:
    """What is known of optimizers; weak, so that nothing of the user's is kept alive."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.watch = watching(session)
        self.loops: weakref.WeakKeyDictionary[nn.Module, _Loop] = weakref.WeakKeyDictionary()
        self.gone: list[_Loop] = []
        self.watch.spent.append(self._spent)
        session.restoring.append(self._restored)

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """One inner step."""

        def step(self_: Any, *args: Any, **kwargs: Any) -> Any:
            guard = self.session.guard
            if not guard.watching:
                return original(self_, *args, **kwargs)
            begun: _Step | None = None
            with guard.work():
                begun = self._begin(self_)
            with guard.inside():
                result = original(self_, *args, **kwargs)
            if begun is not None:
                with guard.work():
                    self._finish(self_, begun)
            return result

        return step

    def _begin(self, optimizer: Any) -> _Step | None:
        """Keep what a step is about to use; None where it has no gradient to use."""
        tensors = list(optimizer.info["model"].parameters())
        gradients = [_gradient(tensor) for tensor in tensors]
        if all(gradient is None for gradient in gradients):
            return None
        loop = self._loop(optimizer)
        pending = self._backward(loop, [*tensors, *optimizer.parameters()])
        task = loop.task  # (what the backward led to may have ended it)
        goes_on = task is not None and _goes_on(task, tensors)
        values = [tensor.detach() for tensor in tensors]
        left = task.last.after if goes_on and task is not None and task.last is not None else None
        before = left if left is not None else snapshot(values, copy=True)
        return _Step(loop, tensors, before, snapshot(gradients, copy=True), pending, goes_on)

    def _loop(self, optimizer: Any) -> _Loop:
        model, models = optimizer.info["model"], self.session.models
        loop = self.loops.get(optimizer)
        if loop is not None:
            if loop.model() is not model:  # it was given another one to move
                loop.model, loop.known = weakref.ref(model), models.register(model)
            return loop
        loop = _Loop(weakref.ref(model), models.register(model), models.register(optimizer))
        self.loops[optimizer] = loop
        self.session.bases.add(loop.transform)
        self.session.unrolled.add(loop.transform)
        # Its first step makes the first graph through the transform.
        self.watch.untouched.add(loop.transform)
        weakref.finalize(optimizer, self.gone.append, loop).atexit = False
        return loop

    def _backward(self, loop: _Loop, tensors: Sequence[Tensor]) -> Pending | None:
        """The backward that made the gradients, which one optimizer or the other uses first."""
        spent, loop.spent = loop.spent, None
        return self.watch.claim(tensors) or spent

    def _spent(self, pending: Pending) -> None:
        """An outer step used a backward: its loss was the query, and may be the next step's own.

        What ran forward for it is left to that step: once is how often it ran.
        """
        for optimizer, loop in list(self.loops.items()):
            if not pending.reached(optimizer.parameters()):
                continue
            loop.spent = pending
            if loop.task is not None and not loop.task.ended:
                site, flags = pending.site, pending.flags
                self.session.query(loop.task, Forwards(), pending.loss, site, flags)

    def _finish(self, optimizer: Any, step: _Step) -> None:
        session, loop, pending = self.session, step.loop, step.pending
        tensors = list(optimizer.info["model"].parameters())
        if len(tensors) != len(loop.known.layout.parameters) or len(tensors) != len(step.before):
            session.unseen("A learn2learn module gained or lost parameters while it was trained.")
            return
        if loop.task is not None:
            self.watch.untouched.discard(loop.transform)  # a loss has been through its graph
        task = loop.task if loop.task is not None and step.goes_on else self._start(loop)
        differentiable = any(not tensor.is_leaf and tensor.requires_grad for tensor in tensors)
        flags = pending.flags & ~FLAGS["second_order"] if pending is not None else 0
        session.step(
            task,
            step.before,
            snapshot([tensor.detach() for tensor in tensors], copy=True),
            step.gradients,
            loss=pending.loss if pending is not None else None,
            learning_rate=_learning_rate(optimizer),
            site=session.sites.here(),
            forwards=self._forwards(pending, step.tensors),
            flags=flags | (FLAGS["second_order"] if differentiable else 0),
            carried=_carried(pending, step.tensors),
        )
        task.fast = [weakref.ref(tensor) for tensor in tensors]
        task.marks = {index: mark_of(tensor) for index, tensor in enumerate(tensors)}

    def _forwards(self, pending: Pending | None, tensors: Sequence[Tensor]) -> Forwards:
        """What ran forward with these weights for the step's loss."""
        forwards = pending.forwards.take() if pending is not None else Forwards()
        forwards.extend(self.session.loose.forwards.take_through(tensors))
        return forwards

    def _start(self, loop: _Loop) -> Task:
        session = self.session
        gone = [other for other in self.gone if other.task is not None]
        for earlier in (*gone, loop):
            if earlier.task is not None:
                session.finish_task(earlier.task)
        del self.gone[:]
        model = loop.model()
        task = session.start_task(
            loop.known,
            "learn2learn",
            session.sites.here(),
            optimizer="LearnableOptimizer",
            in_place=True,
            base_training=model is not None and model.training,
        )
        task.in_place = True
        loop.task = task
        return task

    def _restored(self, task: Task) -> None:
        """The weights a task adapts were loaded anew."""
        if any(loop.task is task for loop in self.loops.values()):
            self.session.finish_task(task)


def _goes_on(task: Task, tensors: Sequence[Tensor]) -> bool:
    """Whether the weights are the very ones a task's last step made, with the values it gave."""
    if task.ended or task.last is None or len(task.fast) != len(tensors):
        return False
    return all(
        made is not None
        and made() is tensor
        and was_left_alone(tensor.detach(), mark_of(tensor), left, task.marks.get(index))
        for index, (made, tensor, left) in enumerate(
            zip(task.fast, tensors, task.last.after, strict=True)
        )
    )


def _gradient(tensor: Tensor) -> Tensor | None:
    """What the step is given: ``.grad``, where looking at it is no warning."""
    gradient = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
    return gradient.detach() if gradient is not None else None


def _carried(pending: Pending | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients the weights had before the backward: a step's new tensors have none."""
    own = set(map(id, tensors))
    carried = pending.carried if pending is not None else []
    return [gradient for leaf, gradient in carried if id(leaf()) in own]


def _learning_rate(optimizer: Any) -> Number:
    rate = optimizer.lr
    return rate.detach() if isinstance(rate, Tensor) else float(rate)
