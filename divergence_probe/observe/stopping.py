"""End the process as soon as a task, or an outer step, is over: what comes after is not needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from divergence_probe.observe.patching import Patches
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task


def stop_after(
    patches: Patches, session: Session, *, task: int | None = None, outer: int | None = None
) -> None:
    """Flush and leave, without a word and without exit handlers, once there is nothing to wait for.

    Args:
        patches: to take the hooks out with.
        session: the watched run.
        task: index of the task whose end is waited for, or None.
        outer: number of outer steps that are waited for, or None.
    """
    parent = os.getpid()
    stepped = 0

    def leave() -> None:
        if os.getpid() == parent:
            session.flush()
            os._exit(0)

    def over(one: Task) -> bool:
        held = one.provisional or not one.ended or task is None
        return not held and one.index <= task < one.index + one.width  # type: ignore[operator]

    def after_task(original: Callable[..., None]) -> Callable[..., None]:
        def finished(one: Task) -> None:
            original(one)
            if over(one):
                leave()

        return finished

    def after_step(original: Callable[..., None]) -> Callable[..., None]:
        def outer_step(*args: Any, **kwargs: Any) -> None:
            nonlocal stepped
            original(*args, **kwargs)
            stepped += 1
            if stepped == outer:
                leave()

        return outer_step

    patches.set_attribute(session, "finish_task", after_task)
    patches.set_attribute(session, "confirm", after_task)
    patches.set_attribute(session, "outer_step", after_step)
