"""What the user says of the loop where it cannot be inferred: tasks, phases, and whole steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from divergence_probe.errors import UsageError
from divergence_probe.observe.capture import Forwards
from divergence_probe.observe.session import Session
from divergence_probe.observe.task import Task

PHASES = ("support", "query", "meta-test")


@contextmanager
def task(session: Session, name: str) -> Iterator[None]:
    """Everything inside is one task called ``name``, whatever tensors it works on."""
    with session.guard.work():
        session.end_tasks()
    outer, session.label = session.label, name
    try:
        yield
    finally:
        with session.guard.work():
            session.end_tasks()
        session.label = outer


@contextmanager
def phase(session: Session, name: str) -> Iterator[None]:
    """What runs inside belongs to ``name``: one of :data:`PHASES`."""
    if name not in PHASES:
        raise UsageError(f"Unknown phase {name!r}. Choose from: {', '.join(PHASES)}.")
    outer, session.phase = session.phase, name
    try:
        yield
    finally:
        session.phase = outer


def step(
    session: Session,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    loss: Tensor | float | None,
    learning_rate: float | None,
) -> None:
    """Record one inner step that no instrument can see, under the names of ``before``."""
    if set(before) != set(after):
        raise UsageError("probe.step: `before` and `after` must have the same names.")
    for values in (before, after, gradients):
        odd = [name for name, value in values.items() if not isinstance(value, Tensor)]
        if odd:
            raise UsageError(f"probe.step: {odd[0]!r} is no tensor, but {type(values[odd[0]])}.")
    with session.guard.work():
        current = _labelled(session, before)
        names = list(before)
        session.step(
            current,
            [before[name].detach().clone() for name in names],
            [after[name].detach().clone() for name in names],
            [gradients[name].detach().clone() if name in gradients else None for name in names],
            loss=loss.detach() if isinstance(loss, Tensor) else loss,
            learning_rate=learning_rate,
            site=session.sites.here(),
            forwards=Forwards(),
        )


def _labelled(session: Session, before: Mapping[str, Tensor]) -> Task:
    """The labelled task that is open, or a new one."""
    known = session.models.named(before)
    for current in reversed(session.open):
        if current.adapter == "labelled" and current.known is known:
            return current
    return session.start_task(known, "labelled", session.sites.here(), base=known)
