"""learn2learn: every ``clone()`` of a learner is a task, every ``adapt()`` of it an inner step.

``clone_module`` copies the module objects and clones their parameters, but BatchNorm buffers stay
shared with the base: adapting a clone moves the base's running statistics. A task ends with its
clone, or when the outer optimizer steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from divergence_probe.observe.capture import Forwards, Number
from divergence_probe.observe.gradients import Taken, library_step
from divergence_probe.observe.models import KnownModel, fast_module_names
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.snapshot import kept_as_stepped
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import leaves
from divergence_probe.record.schema import FLAGS

LIBRARY = "learn2learn"


def install(patches: Patches, session: Session) -> None:
    """Watch ``MAML``, ``MetaSGD`` and ``GBML``."""
    from learn2learn import algorithms

    watch = _Learners(session)
    for learner in (algorithms.MAML, algorithms.MetaSGD, algorithms.GBML):
        patches.set_attribute(learner, "clone", watch.clone)
        patches.set_attribute(learner, "adapt", watch.adapt)


class _Learners:
    """What is known of learners; weak, so that nothing of the user's is kept alive."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tasks: weakref.WeakKeyDictionary[nn.Module, Task] = weakref.WeakKeyDictionary()
        self.known: weakref.WeakKeyDictionary[nn.Module, KnownModel] = weakref.WeakKeyDictionary()
        self.gone: list[Task] = []
        self._asked = -1
        session.closing.append(self._finish_gone)

    def clone(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A copy of a learner is made: a task begins, on the weights of the one it copies."""

        def clone(self_: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self_, *args, **kwargs)
            if self.session.guard.watching:
                with self.session.guard.work():
                    self._start(result, self_)
            return result

        return clone

    def _start(self, learner: Any, parent: Any) -> Task:
        self._finish_gone()
        session = self.session
        known = self.known.get(parent)
        if known is None:
            known = self.known[parent] = session.models.register(parent.module)
            known.refresh(parent.module)
        adapted_from = self.tasks.get(parent)
        task = session.start_task(
            known,
            "learn2learn",
            session.sites.here(),
            base=known,
            optimizer=type(learner).__name__,
            first_order=bool(learner.first_order),
            # A clone of a clone starts where that one's task had come to.
            parent=adapted_from.index if adapted_from is not None else None,
            base_training=bool(parent.module.training),
            compiled=getattr(learner.module, "_compiled_call_impl", None) is not None,
        )
        task.module_names = fast_module_names(learner.module)
        self.tasks[learner] = task
        self.known[learner] = known
        weakref.finalize(learner, self._leave, task).atexit = False
        return task

    def _leave(self, task: Task) -> None:
        """A clone is gone. This runs wherever its last reference dies, so it only takes note."""
        task.module_names = None  # the addresses of its modules may now be others'
        self.gone.append(task)

    def _finish_gone(self) -> None:
        gone, self.gone = self.gone, []
        for task in gone:
            self.session.finish_task(task)

    def adapt(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """One inner step."""

        def adapt(self_: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            guard = self.session.guard
            if not guard.watching:
                return original(self_, loss, *args, **kwargs)
            with guard.work():
                task = self._task(self_)
                module = self_.module
                before = list(module.parameters())
                forwards = self._around(loss)
                forwards.extend(task.forwards.split_for(loss, lambda weight: False))
                site = self.session.sites.here()
            with library_step(guard) as taken:
                result = original(self_, loss, *args, **kwargs)
            with guard.work():
                after = list(self_.module.parameters())
                self._record(self_, task, before, after, taken, loss, forwards, site)
            return result

        return adapt

    def _around(self, loss: Tensor) -> Forwards:
        """What ran outside of any learner (features under an adapted head) and led to ``loss``.

        Told by the loss's graph, which is asked once for what ran since it was asked last.
        """
        loose = self.session.loose.forwards
        calls = [call for call in loose.normalizations if call.order > self._asked]
        if not calls:
            return Forwards()
        self._asked = calls[-1].order
        weights = {id(call.weight()) for call in calls if call.weight is not None}
        return loose.take_through(leaf for leaf in leaves(loss) if id(leaf) in weights)

    def _task(self, learner: Any) -> Task:
        """A learner's task; one that adapts without being a clone moves the base itself."""
        self._finish_gone()
        task = self.tasks.get(learner)
        if task is None or task.ended:
            task = self._start(learner, learner)
            loose = self.session.loose.forwards
            task.forwards.extend(loose.take())
        return task

    def _record(
        self,
        learner: Any,
        task: Task,
        before: list[Tensor],
        after: list[Tensor],
        taken: Taken,
        loss: Tensor,
        forwards: Forwards,
        site: int,
    ) -> None:
        if len(before) != len(task.known.layout.parameters):
            self.session.unseen("A learn2learn module gained or lost parameters while it adapted.")
            return
        gradients = [taken.of(tensor) for tensor in before]
        second_order = any(g is not None and g.requires_grad for g in gradients)
        self.session.step(
            task,
            [kept_as_stepped(tensor) for tensor in before],
            [kept_as_stepped(tensor) for tensor in after],
            [g.detach() if g is not None else None for g in gradients],
            loss=loss.detach(),
            learning_rate=_learning_rate(learner),
            site=site,
            forwards=forwards,
            flags=FLAGS["second_order"] if second_order else 0,
        )
        task.fast = [weakref.ref(tensor) for tensor in after]


def _learning_rate(learner: Any) -> Number:
    rates = getattr(learner, "lrs", None)
    if rates is not None:  # MetaSGD: one rate an element; the largest, whatever its sign
        ends = [torch.aminmax(rate.detach()) for rate in rates if rate.numel()]
        if not ends:
            return None
        lowest = torch.stack([low for low, _ in ends]).min()
        highest = torch.stack([high for _, high in ends]).max()
        return torch.where(highest < -lowest, lowest, highest)
    rate = learner.lr
    return rate.detach() if isinstance(rate, Tensor) else float(rate)
