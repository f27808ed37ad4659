"""tinymeta: every learner is a task, every ``adapt()`` of it an inner step.

An example of an adapter, for divergence_probe/observe/libraries/.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from divergence_probe.observe.gradients import library_step
from divergence_probe.observe.models import fast_module_names
from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session, Task

LIBRARY = "tinymeta"


def install(patches: Patches, session: Session) -> None:
    """Called once the user's program has imported tinymeta."""
    from tinymeta import Learner

    tasks: weakref.WeakKeyDictionary[Any, Task] = weakref.WeakKeyDictionary()

    def begin(learner: Any) -> Task:
        known = session.models.register(learner.model)
        task = session.start_task(known, LIBRARY, session.sites.here(), base=known, optimizer="SGD")
        task.module_names = fast_module_names(learner.module)
        weakref.finalize(learner, end, task).atexit = False
        return task

    def end(task: Task) -> None:
        with session.guard.work():  # runs wherever the learner's last reference dies
            session.finish_task(task)

    def watched(original: Callable[..., None]) -> Callable[..., None]:
        def adapt(learner: Any, loss: Tensor) -> None:
            guard = session.guard
            if not guard.watching:  # our own work, or inside another library's step
                original(learner, loss)
                return
            with guard.work():  # an error in here switches the probe off; the run goes on
                task = tasks.get(learner)
                if task is None:
                    task = tasks[learner] = begin(learner)
                    task.forwards.extend(session.loose.forwards.take())
                parameters = list(learner.module.parameters())
                before = [parameter.detach().clone() for parameter in parameters]
                forwards = task.forwards.take()
                site = session.sites.here()
            with library_step(guard) as taken:  # the user's own call, exactly once
                original(learner, loss)
            with guard.work():
                session.step(
                    task,
                    before,
                    [parameter.detach().clone() for parameter in parameters],
                    [taken.of(parameter) for parameter in parameters],
                    loss=loss.detach(),
                    learning_rate=learner.lr,
                    site=site,
                    forwards=forwards,
                )

        return adapt

    patches.set_attribute(Learner, "adapt", watched)
