"""Fast weights that were made anew, and then written to in place: the loop begins again with them.

Torch counts a tensor's in-place changes, so to ask is next to free. A write through ``.data`` it
does not count: that is seen by value, where a gradient (the query's) was taken before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import call

from torch import Tensor

from divergence_probe.observe.at_hand import is_still, waits_for_nothing
from divergence_probe.observe.models import KnownModel
from divergence_probe.observe.pending import Pending
from divergence_probe.observe.resolution import Update
from divergence_probe.observe.snapshot import Values, gathered
from divergence_probe.observe.task import Task
from divergence_probe.observe.tensors import address_of, changes_of, is_fresh, physical
from divergence_probe.record.schema import FLAGS


def starts_over(task: Task, pending: Pending, update: Update) -> bool:
    """Whether what an update made was written to before anything looked at it: a restart.

    More was done to it in place than to what the updates at this line made before, and it is back
    where the task began, or at zeros. (Weights are also bounded in place, after some steps.) What
    the update made of it was then never seen.
    """
    counts = [
        changes_of(made) if made is not None and made is not reference() else None
        for made, reference in zip(update.tensors, pending.inputs, strict=True)
    ]
    task.counts, task.looked_at = (task.steps + 1, counts), False
    if task.first is None or not _more(counts, pending.learned.counts):
        pending.learned.counts = counts
        return False
    began = gathered(task.first.before, task.positions)
    task.overwritten = all(
        value is not None
        and waits_for_nothing(value)
        and (is_fresh(value) or (start is not None and is_still(value, start)))
        for value, start in zip(update.values, began, strict=True)
    )
    return task.overwritten


def is_overwritten(task: Task) -> bool:
    """Whether a task's fast weights have been written to since the update that made them.

    Asked when a gradient is taken of them; if so it is the next task's. (Where no other gradient
    was taken since that update was settled, it has only just been.)
    """
    step, counts = task.counts
    if task.overwritten or not task.looked_at or step != task.steps or task.last is None:
        return task.overwritten
    if not drop_if_written(task):
        left = gathered(task.last.after, task.positions)
        task.overwritten = not all(
            count is None or tensor is None or is_still(physical(tensor)[0], value)
            for tensor, value, count in zip(_fast(task), left, counts, strict=True)
        )
    return task.overwritten


def drop_if_written(task: Task) -> bool:
    """Whether torch counts more changes of the fast weights now.

    Large ones are kept by reference: then what the last update made is gone, and not measured.
    """
    step, counts = task.counts
    if step != task.steps or task.last is None:
        return False
    fast = _fast(task)
    now = [changes_of(tensor) if tensor is not None else None for tensor in fast]
    if not _more(now, counts):
        return False
    task.overwritten = True
    if _shares_memory(fast, gathered(task.last.after, task.positions)):
        task.last.after = [None] * len(task.last.after)
        task.last.flags |= FLAGS["incomplete"]
    return True


def restarted(task: Task | None, inputs: Sequence[Tensor]) -> tuple[KnownModel, list[int]] | None:
    """The model and the positions of fast weights of ``task`` that have been overwritten."""
    if task is None or not task.overwritten:
        return None
    places = {
        id(tensor): position
        for tensor, position in zip(_fast(task), task.positions, strict=True)
        if tensor is not None
    }
    if any(id(tensor) not in places for tensor in inputs):
        return None
    return task.known, [places[id(tensor)] for tensor in inputs]


def _fast(task: Task) -> list[Tensor | None]:
    """A task's fast weights, in the order of its positions."""
    with suppress(TypeError):  # None among them
        return list(map(call, task.inputs))  # type: ignore[arg-type]
    return [reference() if reference is not None else None for reference in task.inputs]


def _more(counts: Sequence[int | None], before: Sequence[int | None]) -> bool:
    """Whether any count of in-place changes is higher than the one before."""
    if counts == before:  # as almost always
        return False
    return len(counts) == len(before) and any(
        now is not None and then is not None and now > then
        for now, then in zip(counts, before, strict=True)
    )


def _shares_memory(tensors: Sequence[Tensor | None], values: Values) -> bool:
    """Whether values are kept by reference, so that overwriting the tensors overwrote them."""
    return any(
        tensor is not None and value is not None and address_of(tensor) == address_of(value)
        for tensor, value in zip(tensors, values, strict=True)
    )
